/* Network interfaces: found by their MAC address, since only the host knows which is which.
 *
 * What the host says of addresses is so: it has made sure that each is free, so there is no duplicate
 * address detection and no wait for a carrier. Where it does not know, dhcp.c asks.
 *
 * rtnetlink (rtnetlink(7)): one request at a time, each acknowledged. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

/* linux/netlink.h, linux/rtnetlink.h and linux/if_addr.h, which a musl tool chain may lack. */
enum {
	NETLINK_ROUTE = 0, NLMSG_ERROR = 2, NLM_F_REQUEST = 1, NLM_F_ACK = 4, NLM_F_REPLACE = 0x100,
	NLM_F_EXCL = 0x200, NLM_F_CREATE = 0x400, RTM_NEWADDR = 20, RTM_DELADDR = 21, RTM_NEWROUTE = 24,
	IFA_ADDRESS = 1, IFA_LOCAL = 2, IFA_CACHEINFO = 6, IFA_F_NODAD = 2, RTA_DST = 1, RTA_OIF = 4,
	RTA_GATEWAY = 5, RTA_PRIORITY = 6, RT_TABLE_MAIN = 254, RTPROT_BOOT = 3, RT_SCOPE_UNIVERSE = 0, RT_SCOPE_LINK = 253, RTN_UNICAST = 1,
};
struct message_header {
	uint32_t length;
	uint16_t type, flags;
	uint32_t sequence, port;
};
struct address_header {
	uint8_t family, prefix, flags, scope;
	uint32_t index;
};
struct route_header {
	uint8_t family, to_prefix, from_prefix, service, table, protocol, scope, type;
	uint32_t flags;
};

enum { FIND_TIMEOUT_MS = 2000, FIND_TICK_MS = 2, ATTRIBUTES = 128 };

struct request {
	struct message_header header;
	union {
		struct address_header address;
		struct route_header route;
		uint8_t bytes[sizeof(struct route_header) + ATTRIBUTES];
	} body;
};

/* `prefix` is all of it unless the text says otherwise. */
static int parse_address(const char *text, struct address *address)
{
	char host[INET6_ADDRSTRLEN];
	const char *slash = strchrnul(text, '/');
	char *end = NULL;

	*address = (struct address){ strchr(text, ':') ? AF_INET6 : AF_INET, 0, 0, { 0 } };
	address->size = address->family == AF_INET6 ? 16 : 4;
	snprintf(host, sizeof host, "%.*s", (int)(slash - text), text);
	long prefix = *slash ? strtol(slash + 1, &end, 10) : address->size * 8;
	address->prefix = prefix;
	if (inet_pton(address->family, host, address->bytes) == 1 && prefix >= 0 &&
	    prefix <= address->size * 8 &&
	    (!end || (end > slash + 1 && !*end)))
		return 0;
	errno = EINVAL;
	return -1;
}

static int open_socket(int family, int type, int protocol)
{
	return socket(family, type | SOCK_CLOEXEC, protocol);
}

static void add_attribute(struct request *request, uint16_t type, const void *data, uint16_t size)
{
	struct { uint16_t length, type; } attribute = { sizeof attribute + size, type };
	uint8_t *at = (uint8_t *)request + request->header.length;

	memcpy(at, &attribute, sizeof attribute);
	memcpy(at + sizeof attribute, data, size);
	request->header.length += (attribute.length + 3) & ~3;
}

static int await_answer(int fd)
{
	struct {
		struct message_header header;
		int32_t error;
		uint8_t rest[512];
	} answer;

	if (recv(fd, &answer, sizeof answer, 0) < (ssize_t)offsetof(typeof(answer), rest))
		errno = EBADMSG;
	else if (answer.header.type != NLMSG_ERROR)
		errno = EPROTO;
	else if (!answer.error || answer.error == -EEXIST)	/* the setup is being repeated */
		return 0;
	else
		errno = -answer.error;
	return -1;
}

enum { IF_NEW = NLM_F_CREATE | NLM_F_EXCL, IN_PLACE = NLM_F_CREATE | NLM_F_REPLACE };

static int ask(struct request *request, uint16_t flags)
{
	int fd = open_socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	int failed, error;

	if (fd < 0)
		return -1;
	request->header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
	failed = send(fd, request, request->header.length, 0) < 0 || await_answer(fd);
	error = errno;
	close(fd);
	errno = error;
	return failed ? -1 : 0;
}

static struct request about_address(uint16_t type, uint32_t index, const struct address *address)
{
	struct request request = { .header.type = type };

	request.header.length = sizeof request.header + sizeof request.body.address;
	request.body.address = (struct address_header){
		.family = address->family, .prefix = address->prefix, .index = index,
		.flags = address->family == AF_INET6 ? IFA_F_NODAD : 0,
	};
	add_attribute(&request, IFA_LOCAL, address->bytes, address->size);
	add_attribute(&request, IFA_ADDRESS, address->bytes, address->size);
	return request;
}

static int add_address(uint32_t index, const struct address *address)
{
	struct request request = about_address(RTM_NEWADDR, index, address);

	return ask(&request, IF_NEW);
}

/* For so long, from now on; all ones: for ever. */
int set_address(uint32_t index, const struct address *address, uint32_t seconds)
{
	struct { uint32_t preferred, valid, made, changed; } times = { seconds, seconds, 0, 0 };
	struct request request = about_address(RTM_NEWADDR, index, address);

	add_attribute(&request, IFA_CACHEINFO, &times, sizeof times);
	return ask(&request, IN_PLACE);
}

/* And what is routed by it. */
int drop_address(uint32_t index, const struct address *address)
{
	struct request request = about_address(RTM_DELADDR, index, address);

	return ask(&request, 0);
}

/* The default route, if there is a gateway; else `destination` is on the link itself. */
static struct request about_route(uint32_t index, const struct address *to, const struct address *gateway)
{
	struct request request = { .header.type = RTM_NEWROUTE };
	const struct address *known = gateway ? gateway : to;

	request.header.length = sizeof request.header + sizeof request.body.route;
	request.body.route = (struct route_header){
		.family = known->family, .to_prefix = to ? to->prefix : 0, .table = RT_TABLE_MAIN,
		.protocol = RTPROT_BOOT, .type = RTN_UNICAST,
		.scope = gateway ? RT_SCOPE_UNIVERSE : RT_SCOPE_LINK,
	};
	if (to)
		add_attribute(&request, RTA_DST, to->bytes, to->size);
	if (gateway)
		add_attribute(&request, RTA_GATEWAY, gateway->bytes, gateway->size);
	add_attribute(&request, RTA_OIF, &index, sizeof index);
	return request;
}

static int add_route(uint32_t index, const struct address *to, const struct address *gateway)
{
	struct request request = about_route(index, to, gateway);

	return ask(&request, IF_NEW);
}

/* In the place of one of the same metric. A gateway outside of all prefixes is on the link. */
int set_route(uint32_t index, const struct address *to, const struct address *gateway, uint32_t metric)
{
	struct request request = about_route(index, to, gateway), way;

	add_attribute(&request, RTA_PRIORITY, &metric, sizeof metric);
	if (!ask(&request, IN_PLACE))
		return 0;
	if (errno != ENETUNREACH || !gateway)
		return -1;
	way = about_route(index, gateway, NULL);
	add_attribute(&way, RTA_PRIORITY, &metric, sizeof metric);
	return ask(&way, IN_PLACE) || ask(&request, IN_PLACE) ? -1 : 0;
}

/* Through a gateway that may lie outside of all prefixes (a /32 address): then it is on the link. */
static int add_gateway(uint32_t index, const char *text)
{
	struct address gateway;

	if (parse_address(text, &gateway))
		return -1;
	if (!add_route(index, NULL, &gateway))
		return 0;
	return errno == ENETUNREACH && !add_route(index, &gateway, NULL) ? add_route(index, NULL, &gateway) : -1;
}

static bool has_mac(int fd, struct ifreq *request, const uint8_t mac[6])
{
	return !ioctl(fd, SIOCGIFHWADDR, request) && request->ifr_hwaddr.sa_family == ARPHRD_ETHER &&
	       !memcmp(request->ifr_hwaddr.sa_data, mac, 6);
}

/* Fills in the name; false if there is none. */
static bool look_for(int fd, const uint8_t mac[6], struct ifreq *request)
{
	struct if_nameindex *all = if_nameindex();
	bool found = false;

	for (struct if_nameindex *one = all; one && one->if_index && !found; one++) {
		*request = (struct ifreq){ 0 };
		snprintf(request->ifr_name, sizeof request->ifr_name, "%s", one->if_name);
		found = has_mac(fd, request, mac);
	}
	if (all)
		if_freenameindex(all);
	return found;
}

/* Drivers find their devices while they are loaded, so that it is there as a rule. */
static int await_interface(int fd, const char *text, struct ifreq *request)
{
	struct timespec tick = { .tv_nsec = FIND_TICK_MS * 1000000 };
	uint8_t mac[6];
	int end = 0;

	if (sscanf(text, "%2hhx:%2hhx:%2hhx:%2hhx:%2hhx:%2hhx%n", &mac[0], &mac[1], &mac[2], &mac[3],
		   &mac[4], &mac[5], &end) != 6 || text[end]) {
		errno = EINVAL;
		return -1;
	}
	for (int waited = 0; !look_for(fd, mac, request); waited += FIND_TICK_MS) {
		if (waited >= FIND_TIMEOUT_MS) {
			errno = ENODEV;
			return -1;
		}
		nanosleep(&tick, NULL);
	}
	return 0;
}

static int set_up(int fd, struct ifreq *request)
{
	if (ioctl(fd, SIOCGIFFLAGS, request))
		return -1;
	request->ifr_flags |= IFF_UP;
	return ioctl(fd, SIOCSIFFLAGS, request);
}

static int set_mtu(int fd, struct ifreq *request, uint32_t mtu)
{
	request->ifr_mtu = mtu;
	return mtu ? ioctl(fd, SIOCSIFMTU, request) : 0;
}

static int configure(int fd, const char *mac, uint32_t mtu, const char **addresses, const char **gateways)
{
	struct ifreq request;
	struct address address;
	int failed;

	if (await_interface(fd, mac, &request) || set_mtu(fd, &request, mtu) || set_up(fd, &request))
		return -1;
	uint32_t index = if_nametoindex(request.ifr_name);
	for (failed = 0; *addresses && !failed; addresses++)
		failed = parse_address(*addresses, &address) || add_address(index, &address);
	for (; *gateways && !failed; gateways++)
		failed = add_gateway(index, *gateways);
	return failed ? -1 : 0;
}

int find_interface(const char *mac, struct interface *interface)
{
	struct ifreq request;
	int fd = open_socket(AF_INET, SOCK_DGRAM, 0);
	int failed = fd < 0 || await_interface(fd, mac, &request), error = errno;

	if (fd >= 0)
		close(fd);
	if (!failed) {
		memcpy(interface->name, request.ifr_name, IF_NAMESIZE);
		memcpy(interface->mac, request.ifr_hwaddr.sa_data, 6);
		interface->index = if_nametoindex(interface->name);
	}
	errno = error;
	return failed ? -1 : 0;
}

/* Never raise it: its own is the most that the network has promised to carry. */
void lower_mtu(const struct interface *interface, uint32_t mtu)
{
	struct ifreq request = { 0 };
	int fd = open_socket(AF_INET, SOCK_DGRAM, 0);

	memcpy(request.ifr_name, interface->name, IF_NAMESIZE);
	if (fd >= 0 && !ioctl(fd, SIOCGIFMTU, &request) && (uint32_t)request.ifr_mtu > mtu)
		set_mtu(fd, &request, mtu);
	if (fd >= 0)
		close(fd);
}

int step_link(struct cursor *cursor)
{
	const char *mac = take_string(cursor);
	uint32_t mtu = take_u32(cursor);
	const char **addresses = take_strings(cursor), **gateways = take_strings(cursor);
	int fd = open_socket(AF_INET, SOCK_DGRAM, 0);
	int failed = fd < 0 || (!cursor->bad && configure(fd, mac, mtu, addresses, gateways));
	int error = errno;

	if (fd >= 0)
		close(fd);
	free(addresses);
	free(gateways);
	errno = error;
	return failed ? -1 : 0;
}

/* The loopback interface, and ping(8) for everybody: its sockets are closed to all by default, and its
 * right to use raw ones (a file capability) is not seen through a shared root. */
void network_basics(void)
{
	static const char all[] = "0 2147483647";
	struct ifreq request = { .ifr_name = "lo" };
	int fd = open_socket(AF_INET, SOCK_DGRAM, 0);

	if (fd < 0)
		return;		/* a kernel without IP */
	set_up(fd, &request);
	close(fd);
	fd = open("/proc/sys/net/ipv4/ping_group_range", O_WRONLY | O_CLOEXEC);
	if (fd >= 0 && write(fd, all, sizeof all - 1) < 0)
		errno = 0;
	if (fd >= 0)
		close(fd);
}
