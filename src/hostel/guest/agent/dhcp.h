/* DHCPv4 (RFC 2131): what one message says. Addresses are in network byte order, all else in the host's. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { DISCOVER = 1, OFFER = 2, REQUEST = 3, ACK = 5, NAK = 6 };	/* RFC 2132 §9.6 */
enum { MAX_ROUTES = 16, MAX_SERVERS = 3, MAX_DOMAIN = 253, FOR_EVER = 0xffffffff };

/* RFC 2131 §2. As it is sent: with room for the options of ours, and no shorter than BOOTP's 300 bytes. */
struct dhcp_message {
	uint8_t op, hardware, hardware_size, hops;
	uint32_t id;
	uint16_t seconds, flags;
	uint32_t client, yours, next, relay;
	uint8_t mac[16], server_name[64], file[128], magic[4], options[64];
};

struct route {
	uint32_t to, gateway;	/* gateway 0: on the link itself */
	uint8_t prefix;
};

struct lease {
	uint8_t type;		/* of the message */
	uint8_t prefix;
	uint32_t address, server;
	uint32_t renew, rebind, seconds;	/* T1, T2 and the end, from when it was asked for */
	uint16_t mtu;		/* 0: not said */
	uint32_t servers[MAX_SERVERS];	/* of names; 0 where there is none */
	struct route routes[MAX_ROUTES];
	size_t route_count;
	char domain[MAX_DOMAIN + 1];	/* "" if there is none, or one that is no name */
};

/* `wanted` names the address and the server of a REQUEST that answers an OFFER; NULL otherwise. */
void dhcp_ask(struct dhcp_message *message, uint8_t type, const struct lease *wanted);
bool dhcp_read(const uint8_t *data, size_t size, uint32_t id, const uint8_t mac[6], struct lease *lease);

/* Within an IPv4 packet, as a packet socket gives and takes it. */
enum { UDP_HEADERS = 28, SERVER_PORT = 67, CLIENT_PORT = 68 };
void udp_wrap(uint8_t *packet, size_t payload);
const uint8_t *udp_unwrap(const uint8_t *packet, size_t *size);
