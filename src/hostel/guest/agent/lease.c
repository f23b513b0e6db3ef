/* DHCPv4 messages: what is asked, and what an answer says (RFC 2131, RFC 2132, RFC 3442).
 *
 * An answer comes from whoever is on the network. Every length is checked against what has come; a value
 * that makes no sense is as if it were absent, and without an address and a server there is no lease. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <string.h>

#include "dhcp.h"

/* RFC 2132, by section: 3.3, 3.5, 3.8, 3.17, 5.1, 9.1 to 9.3, 9.6 to 9.8, 9.10 to 9.12; RFC 3442. */
enum {
	PAD = 0, MASK = 1, ROUTER = 3, NAME_SERVERS = 6, DOMAIN = 15, MTU = 26, WANTED_ADDRESS = 50,
	LEASE_SECONDS = 51, OVERLOAD = 52, TYPE = 53, SERVER = 54, WISHES = 55, LARGEST = 57, RENEWAL = 58,
	REBINDING = 59, ROUTES = 121, END = 255,
};
enum {
	BOOT_REQUEST = 1, BOOT_REPLY = 2, ETHERNET = 1, BROADCAST = 0x8000, MOST_SIZE = 1472,
	LEAST_MTU = 576, LEAST_SECONDS = 10, UDP = 17,
};
static const uint8_t magic[4] = { 99, 130, 83, 99 };

/* What is asked */

static uint8_t *put(uint8_t *at, uint8_t code, const void *data, uint8_t size)
{
	*at++ = code;
	*at++ = size;
	memcpy(at, data, size);
	return at + size;
}

void dhcp_ask(struct dhcp_message *message, uint8_t type, const struct lease *wanted)
{
	static const uint8_t wishes[] = { MASK, ROUTES, ROUTER, NAME_SERVERS, DOMAIN, MTU, LEASE_SECONDS, RENEWAL, REBINDING };
	const uint16_t largest = htons(MOST_SIZE);
	uint8_t *at = message->options;

	message->op = BOOT_REQUEST;
	message->hardware = ETHERNET;
	message->hardware_size = 6;
	/* To all: who has no address yet would not be given what is sent to one. */
	message->flags = message->client ? 0 : htons(BROADCAST);
	memcpy(message->magic, magic, sizeof magic);
	at = put(at, TYPE, &type, 1);
	at = put(at, LARGEST, &largest, sizeof largest);
	at = put(at, WISHES, wishes, sizeof wishes);
	if (wanted) {
		at = put(at, WANTED_ADDRESS, &wanted->address, 4);
		at = put(at, SERVER, &wanted->server, 4);
	}
	*at = END;
}

/* What an answer says */

struct option {
	const uint8_t *data;
	uint8_t size;
};

/* The first of a kind counts. */
static void collect(const uint8_t *at, const uint8_t *end, struct option *options)
{
	while (at < end && *at != END) {
		if (*at == PAD) {
			at++;
			continue;
		}
		if (end - at < 2 || end - at - 2 < at[1])
			return;
		if (!options[*at].data)
			options[*at] = (struct option){ at + 2, at[1] };
		at += 2 + at[1];
	}
}

static uint32_t number(const struct option *option, uint8_t size, uint32_t otherwise)
{
	uint32_t value = 0;

	if (!option->data || option->size != size)
		return otherwise;
	for (uint8_t i = 0; i < size; i++)
		value = value << 8 | option->data[i];
	return value;
}

static uint32_t address_at(const struct option *option, size_t index)
{
	uint32_t address = 0;

	if (option->data && option->size >= 4 * (index + 1))
		memcpy(&address, option->data + 4 * index, 4);
	return address;
}

/* Of a machine: not 0/8, 127/8, multicast or beyond. */
static bool is_unicast(uint32_t address)
{
	uint8_t first = ntohl(address) >> 24;

	return first && first != 127 && first < 224;
}

/* Without a mask that is one, the one of its class (RFC 1122 §3.2.1.3). */
static uint8_t prefix_of(uint32_t mask, uint32_t address)
{
	uint32_t hosts = ~mask;

	if (mask && !(hosts & (hosts + 1)))
		return __builtin_popcount(mask);
	uint8_t first = ntohl(address) >> 24;
	return first < 128 ? 8 : first < 192 ? 16 : 24;
}

/* Not the network itself, nor all of it. */
static bool is_machine(uint32_t address, uint8_t prefix)
{
	uint32_t hosts = prefix < 31 ? 0xffffffffu >> prefix : 0, part = ntohl(address) & hosts;

	return is_unicast(address) && (!hosts || (part && part != hosts));
}

static void take_times(struct lease *lease, const struct option *options)
{
	uint32_t seconds = number(&options[LEASE_SECONDS], 4, 0);

	lease->seconds = seconds < LEAST_SECONDS ? LEAST_SECONDS : seconds;
	lease->renew = number(&options[RENEWAL], 4, lease->seconds / 2);
	lease->rebind = number(&options[REBINDING], 4, lease->seconds / 8 * 7);
	if (lease->renew < 2 || lease->renew > lease->rebind || lease->rebind > lease->seconds) {
		lease->renew = lease->seconds / 2;	/* RFC 2131 §4.4.5 */
		lease->rebind = lease->seconds / 8 * 7;
	}
}

static void add_route(struct lease *lease, uint32_t to, uint8_t prefix, uint32_t gateway)
{
	uint32_t mask = prefix ? htonl(0xffffffffu << (32 - prefix)) : 0;

	if (lease->route_count < MAX_ROUTES && (!gateway || is_unicast(gateway)))
		lease->routes[lease->route_count++] = (struct route){ to & mask, gateway, prefix };
}

/* RFC 3442: a prefix, as many bytes of the destination as it covers, the router. */
static void take_routes(struct lease *lease, const struct option *option)
{
	const uint8_t *at = option->data, *end = at + option->size;

	while (at < end && *at <= 32 && end - at >= 1 + (*at + 7) / 8 + 4) {
		uint8_t prefix = *at++, size = (prefix + 7) / 8;
		uint32_t to = 0, gateway;

		memcpy(&to, at, size);
		memcpy(&gateway, at + size, 4);
		at += size + 4;
		add_route(lease, to, prefix, gateway);
	}
}

/* It goes into a file: letters, digits, dots and what stands between them. */
static void take_domain(struct lease *lease, const struct option *option)
{
	static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.";
	size_t size = option->size;

	while (size && !option->data[size - 1])		/* some servers end it */
		size--;
	if (!size || size > MAX_DOMAIN || *option->data == '-')
		return;
	memcpy(lease->domain, option->data, size);
	if (strspn(lease->domain, letters) != size)
		memset(lease->domain, 0, sizeof lease->domain);
}

static void take_settings(struct lease *lease, const struct option *options)
{
	uint32_t mtu = number(&options[MTU], 2, 0), router = address_at(&options[ROUTER], 0);

	lease->mtu = mtu < LEAST_MTU ? 0 : mtu;
	for (size_t i = 0, count = 0; i < MAX_SERVERS; i++)
		if (is_unicast(address_at(&options[NAME_SERVERS], i)))
			lease->servers[count++] = address_at(&options[NAME_SERVERS], i);
	if (options[ROUTES].data)
		take_routes(lease, &options[ROUTES]);	/* then the other is to be ignored */
	else if (is_unicast(router))
		add_route(lease, 0, 0, router);
	if (options[DOMAIN].data)
		take_domain(lease, &options[DOMAIN]);
}

/* Whether it is an answer to us; then what it says. */
bool dhcp_read(const uint8_t *data, size_t size, uint32_t id, const uint8_t mac[6], struct lease *lease)
{
	struct option options[256] = { { 0 } };
	struct dhcp_message head;
	const size_t fixed = offsetof(struct dhcp_message, options);

	*lease = (struct lease){ 0 };
	if (size < fixed)
		return false;
	memcpy(&head, data, fixed);
	if (head.op != BOOT_REPLY || head.hardware != ETHERNET || head.hardware_size != 6 || head.id != id ||
	    memcmp(head.mac, mac, 6) || memcmp(head.magic, magic, sizeof magic))
		return false;
	collect(data + fixed, data + size, options);
	uint32_t overload = number(&options[OVERLOAD], 1, 0);
	if (overload & 1)
		collect(data + offsetof(struct dhcp_message, file), data + fixed - sizeof magic, options);
	if (overload & 2)
		collect(data + offsetof(struct dhcp_message, server_name), data + offsetof(struct dhcp_message, file), options);
	lease->type = number(&options[TYPE], 1, 0);
	lease->server = address_at(&options[SERVER], 0);
	if (lease->type == NAK)
		return lease->server;
	lease->address = head.yours;
	lease->prefix = prefix_of(ntohl(address_at(&options[MASK], 0)), lease->address);
	if ((lease->type != OFFER && lease->type != ACK) || !is_unicast(lease->server) ||
	    !is_machine(lease->address, lease->prefix))
		return false;
	take_times(lease, options);
	take_settings(lease, options);
	return true;
}

/* IPv4 and UDP around it */

static uint16_t checksum(const uint8_t *data, size_t size)
{
	uint32_t sum = 0;

	for (size_t i = 0; i < size; i++)
		sum += i % 2 ? data[i] : data[i] << 8;
	while (sum >> 16)
		sum = (sum & 0xffff) + (sum >> 16);
	return ~sum;
}

static void store(uint8_t *at, uint16_t value)
{
	at[0] = value >> 8;
	at[1] = value;
}

/* From nobody (0.0.0.0) to all. The payload lies behind the headers already. */
void udp_wrap(uint8_t *packet, size_t payload)
{
	uint8_t *udp = packet + 20;

	memset(packet, 0, UDP_HEADERS);
	store(udp, CLIENT_PORT);
	store(udp + 2, SERVER_PORT);
	store(udp + 4, 8 + payload);
	memset(packet + 16, 0xff, 4);
	packet[9] = UDP;
	store(packet + 2, 8 + payload);	/* so far the pseudo header's length: where it stands does not matter */
	uint16_t sum = checksum(packet, UDP_HEADERS + payload);
	store(udp + 6, sum ? sum : 0xffff);
	packet[0] = 0x45;
	packet[8] = 64;
	store(packet + 2, UDP_HEADERS + payload);
	store(packet + 10, checksum(packet, 20));
}

/* The payload of a whole datagram to a client, or NULL. Its sum is not checked: of a sender on the same
 * host the device has yet to fill it in, and whoever lies can sum. */
const uint8_t *udp_unwrap(const uint8_t *packet, size_t *size)
{
	if (*size < UDP_HEADERS || packet[0] >> 4 != 4)
		return NULL;
	size_t header = (packet[0] & 15) * 4, total = packet[2] << 8 | packet[3];
	if (header < 20 || total > *size || total < header + 8 || packet[9] != UDP ||
	    (packet[6] & 0x3f) || packet[7])	/* a fragment */
		return NULL;
	const uint8_t *udp = packet + header;
	size_t length = udp[4] << 8 | udp[5];
	if ((udp[2] << 8 | udp[3]) != CLIENT_PORT || length < 8 || length > total - header)
		return NULL;
	*size = length - 8;
	return udp + 8;
}
