/* A DHCPv4 client (RFC 2131), one process for each interface that is to ask.
 *
 *   step_dhcp ── fork ──▶ discover ⇄ request ──▶ bound ── T1 ──▶ renewing ── T2 ──▶ rebinding ── end ──┐
 *       │   waits, bounded    ▲ all by packet socket │ no socket    by UDP          by packet socket       │
 *       ◀── "MAC ADDRESS" ────┼──────────────────────┘                                                     │
 *                             └────────────────────────────────────────────────────────────────────────────┘
 *
 * While it is bound it sleeps and holds no socket: a packet socket costs each packet of the guest's a look.
 * The kernel itself ends an address whose lease is over, whatever has become of this process. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <netpacket/packet.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"
#include "dhcp.h"

/* linux/if_ether.h and linux/filter.h, which a musl tool chain may lack. */
enum { ETH_IPV4 = 0x0800, ATTACH_FILTER = 26 };
struct filter_step {
	uint16_t code;
	uint8_t then, otherwise;
	uint32_t value;
};
struct filter {
	unsigned short length;
	const struct filter_step *steps;
};

enum {
	FIRST_PAUSE_MS = 1000, LONGEST_PAUSE_MS = 64000, REQUEST_MS = 15000, RECEIVED = 2048,
	MAX_CLIENTS = 32, METRIC = 1024, RESOLVER_SIZE = 4096,
};
static const char resolver_path[] = "/etc/resolv.conf";

struct client {
	struct interface interface;
	uint32_t id;
	int fd;			/* what it asks by, or -1 */
	bool is_packet;		/* a packet socket: headers are ours */
	int report;		/* to the agent, until there is an address */
	int resolver;		/* the file as it was at the start: a volume may cover its name later */
	int64_t asked;		/* when the lease was asked for, which is when it begins (RFC 2131 §4.4.1) */
};

static int64_t milliseconds(void)
{
	struct timespec time;

	clock_gettime(CLOCK_BOOTTIME, &time);	/* goes on while the machine is suspended, as leases do */
	return time.tv_sec * 1000LL + time.tv_nsec / 1000000;
}

static void sleep_until(int64_t when)
{
	struct timespec time = { when / 1000, when % 1000 * 1000000 };

	while (clock_nanosleep(CLOCK_BOOTTIME, TIMER_ABSTIME, &time, NULL) == EINTR)
		;
}

static uint32_t chance(void)
{
	uint32_t value;

	if (getrandom(&value, sizeof value, GRND_NONBLOCK) == sizeof value)
		return value;
	return milliseconds() * 2654435761u ^ getpid();	/* early in a boot: no secret, only another's is unlikely */
}

/* The two sockets */

static void close_socket(struct client *client)
{
	if (client->fd >= 0)
		close(client->fd);
	client->fd = -1;
}

/* IPv4, whole, UDP, to our port. */
static void filter_packets(int fd)
{
	enum { BYTE_AT = 0x30, HALF_AT = 0x28, HALF_BEHIND = 0x48, HEADER_SIZE_AT = 0xb1, IS = 0x15, ANY_OF = 0x45, TAKE = 6 };
	static const struct filter_step steps[] = {
		{ BYTE_AT, 0, 0, 9 }, { IS, 0, 6, 17 },
		{ HALF_AT, 0, 0, 6 }, { ANY_OF, 4, 0, 0x3fff },
		{ HEADER_SIZE_AT, 0, 0, 0 }, { HALF_BEHIND, 0, 0, 2 }, { IS, 0, 1, CLIENT_PORT },
		{ TAKE, 0, 0, RECEIVED }, { TAKE, 0, 0, 0 },
	};
	struct filter filter = { sizeof steps / sizeof *steps, steps };

	setsockopt(fd, SOL_SOCKET, ATTACH_FILTER, &filter, sizeof filter);	/* without it, more is looked at */
}

static struct sockaddr_ll everybody(const struct client *client)
{
	return (struct sockaddr_ll){
		.sll_family = AF_PACKET, .sll_protocol = htons(ETH_IPV4), .sll_ifindex = client->interface.index,
		.sll_halen = 6, .sll_addr = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff },
	};
}

static void open_packet(struct client *client)
{
	struct sockaddr_ll address = everybody(client);

	close_socket(client);
	client->is_packet = true;
	client->fd = socket(AF_PACKET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (client->fd < 0)
		return;
	filter_packets(client->fd);
	if (bind(client->fd, (struct sockaddr *)&address, sizeof address))
		close_socket(client);
}

/* From our address to the server: that is how it knows who renews. Somebody else may have the port. */
static void open_udp(struct client *client, const struct lease *lease)
{
	struct sockaddr_in ours = { AF_INET, htons(CLIENT_PORT), { lease->address }, { 0 } };
	struct sockaddr_in server = { AF_INET, htons(SERVER_PORT), { lease->server }, { 0 } };
	const char *name = client->interface.name;

	close_socket(client);
	client->is_packet = false;
	client->fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (client->fd >= 0 && (setsockopt(client->fd, SOL_SOCKET, SO_BINDTODEVICE, name, strlen(name) + 1) ||
				bind(client->fd, (struct sockaddr *)&ours, sizeof ours) ||
				connect(client->fd, (struct sockaddr *)&server, sizeof server)))
		close_socket(client);
}

static void transmit(const struct client *client, const struct dhcp_message *message)
{
	uint8_t packet[UDP_HEADERS + sizeof *message];
	struct sockaddr_ll to = everybody(client);

	if (!client->is_packet) {
		send(client->fd, message, sizeof *message, 0);
		return;
	}
	memcpy(packet + UDP_HEADERS, message, sizeof *message);
	udp_wrap(packet, sizeof *message);
	sendto(client->fd, packet, sizeof packet, 0, (struct sockaddr *)&to, sizeof to);
}

/* The next answer to us before `until`; false if none comes. */
static bool receive(const struct client *client, int64_t until, struct lease *answer)
{
	uint8_t received[RECEIVED];
	struct pollfd ready = { client->fd, POLLIN, 0 };
	int64_t left;

	while ((left = until - milliseconds()) > 0) {
		if (poll(&ready, 1, left) <= 0)
			continue;
		ssize_t got = recv(client->fd, received, sizeof received, MSG_DONTWAIT);
		size_t size = got < 0 ? 0 : got;
		const uint8_t *payload = client->is_packet ? udp_unwrap(received, &size) : received;
		if (payload && dhcp_read(payload, size, client->id, client->interface.mac, answer))
			return true;
	}
	return false;
}

/* Asking */

static bool answers(uint8_t type, const struct lease *wanted, const struct lease *answer)
{
	if (type == DISCOVER)
		return answer->type == OFFER;
	return answer->type == NAK || (answer->type == ACK && answer->address == wanted->address);
}

/* Asks again and again, each time with more patience. False if there is no answer until then. */
static bool ask(struct client *client, const struct dhcp_message *message, const struct lease *wanted,
		int64_t until, struct lease *answer)
{
	struct dhcp_message copy = *message;
	uint8_t type = wanted ? REQUEST : DISCOVER;

	for (int64_t pause = FIRST_PAUSE_MS, now; (now = milliseconds()) < until;) {
		int64_t end = now + pause + chance() % 256;
		end = end < until ? end : until;
		copy.seconds = htons((now - client->asked) / 1000 & 0xffff);
		if (client->fd < 0)
			sleep_until(end);
		else
			transmit(client, &copy);
		while (client->fd >= 0 && receive(client, end, answer))
			if (answers(type, wanted, answer))
				return true;
		pause = pause * 2 < LONGEST_PAUSE_MS ? pause * 2 : LONGEST_PAUSE_MS;
	}
	return false;
}

static struct dhcp_message begin(struct client *client, uint32_t own)
{
	struct dhcp_message message = { .id = client->id, .client = own };

	memcpy(message.mac, client->interface.mac, 6);
	return message;
}

/* INIT to BOUND: as long as it takes. */
static void acquire(struct client *client, struct lease *lease)
{
	struct lease offer;

	for (lease->type = 0; lease->type != ACK;) {
		client->id = chance();
		client->asked = milliseconds();
		open_packet(client);
		struct dhcp_message message = begin(client, 0);
		dhcp_ask(&message, DISCOVER, NULL);
		if (!ask(client, &message, NULL, INT64_MAX, &offer))
			continue;
		message = begin(client, 0);
		dhcp_ask(&message, REQUEST, &offer);
		if (!ask(client, &message, &offer, milliseconds() + REQUEST_MS, lease) || lease->type == NAK)
			sleep_until(milliseconds() + FIRST_PAUSE_MS);	/* a server that says no is not to be stormed */
	}
	close_socket(client);
}

/* What has been agreed on */

static void name_servers(const struct client *client, const struct lease *lease)
{
	char path[64], known[RESOLVER_SIZE + 1] = "", text[512], line[INET_ADDRSTRLEN + 16];
	size_t size = 0;

	snprintf(path, sizeof path, "/proc/self/fd/%d", client->resolver);
	int fd = open(path, O_RDWR | O_APPEND | O_CLOEXEC);
	if (fd < 0)
		return;		/* it was never there, or cannot be written any more */
	if (read(fd, known, RESOLVER_SIZE) < 0)
		*known = 0;
	for (size_t i = 0; i < MAX_SERVERS && lease->servers[i]; i++) {
		char address[INET_ADDRSTRLEN];
		inet_ntop(AF_INET, &lease->servers[i], address, sizeof address);
		snprintf(line, sizeof line, "nameserver %s\n", address);
		if (!strstr(known, line))
			size += snprintf(text + size, sizeof text - size, "%s", line);
	}
	if (*lease->domain && !strstr(known, "search "))
		size += snprintf(text + size, sizeof text - size, "search %s\n", lease->domain);
	if (size && write(fd, text, size) < 0)
		errno = 0;
	close(fd);
}

static struct address ipv4(uint32_t address, uint8_t prefix)
{
	struct address made = { AF_INET, 4, prefix, { 0 } };

	memcpy(made.bytes, &address, 4);
	return made;
}

static void apply(const struct client *client, const struct lease *lease)
{
	struct address own = ipv4(lease->address, lease->prefix);
	uint32_t index = client->interface.index;

	if (lease->mtu)
		lower_mtu(&client->interface, lease->mtu);
	set_address(index, &own, lease->seconds);
	for (size_t i = 0; i < lease->route_count; i++) {
		const struct route *route = &lease->routes[i];
		struct address to = ipv4(route->to, route->prefix), gateway = ipv4(route->gateway, 32);
		set_route(index, &to, route->gateway ? &gateway : NULL, METRIC + index);
	}
	name_servers(client, lease);
}

static void tell(struct client *client, const struct lease *lease)
{
	char address[INET_ADDRSTRLEN], line[64];

	inet_ntop(AF_INET, &lease->address, address, sizeof address);
	int size = snprintf(line, sizeof line, "%s/%d", address, lease->prefix);
	if (client->report >= 0 && write(client->report, line, size) < 0)
		errno = 0;	/* the agent waits no longer */
	close(client->report);
	client->report = -1;
}

/* By the server first, then by anybody. False once the address is ours no more. */
static bool renew(struct client *client, struct lease *lease)
{
	int64_t begun = client->asked;
	struct dhcp_message message = begin(client, lease->address);
	struct lease answer;

	sleep_until(begun + lease->renew * 1000LL);
	client->asked = milliseconds();
	dhcp_ask(&message, REQUEST, NULL);
	open_udp(client, lease);
	bool answered = ask(client, &message, lease, begun + lease->rebind * 1000LL, &answer);
	if (!answered) {
		open_packet(client);
		answered = ask(client, &message, lease, begun + lease->seconds * 1000LL, &answer);
	}
	close_socket(client);
	if (!answered || answer.type == NAK)
		return false;
	*lease = answer;
	return true;
}

static _Noreturn void run(struct client *client)
{
	for (;;) {
		struct lease lease;
		acquire(client, &lease);
		do {
			apply(client, &lease);
			tell(client, &lease);
			if (lease.seconds == FOR_EVER)
				_exit(0);
		} while (renew(client, &lease));
		struct address own = ipv4(lease.address, lease.prefix);
		drop_address(client->interface.index, &own);
	}
}

/* The agent's side */

enum { REPORT = 3 };	/* where child_self() puts the pipe */

static _Noreturn void child(struct client *client, pid_t agent)
{
	char name[16];

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != agent)
		_exit(0);
	snprintf(name, sizeof name, "dhcp %.10s", client->interface.name);
	prctl(PR_SET_NAME, name);
	client->report = REPORT;
	client->resolver = open(resolver_path, O_PATH | O_CLOEXEC);
	run(client);
}

/* The end of a pipe that gives the address, or -1. */
static int start(const struct interface *interface)
{
	struct client client = { .interface = *interface, .fd = -1 };
	struct child self = { { -1, -1, -1 }, -1, -1 };
	pid_t agent = getpid(), pid;
	int ends[2];

	if (pipe2(ends, O_CLOEXEC))
		return -1;
	self.status = ends[1];
	pid = fork();
	if (!pid) {
		child_self(&self);
		child(&client, agent);
	}
	close(ends[1]);
	if (pid < 0)
		close(ends[0]);
	return pid < 0 ? -1 : ends[0];
}

/* "MAC ADDRESS/PREFIX" or "MAC " on a line of its own. */
static void await(int fd, const char *mac, int64_t until)
{
	struct pollfd ready = { fd, POLLIN, 0 };
	char address[64] = "", line[128];
	int64_t left = until - milliseconds();

	if (poll(&ready, 1, left > 0 ? left : 0) > 0 && read(fd, address, sizeof address - 1) < 0)
		*address = 0;
	snprintf(line, sizeof line, "%.20s %s\n", mac, address);
	setup_says(line);
}

/* All ask at once. That nobody answers is no failure: the clients go on. */
int step_dhcp(struct cursor *cursor)
{
	uint32_t patience = take_u32(cursor), count = 0;
	const char **macs = take_strings(cursor);
	int64_t until = milliseconds() + patience;
	int pipes[MAX_CLIENTS], failed = 0, error;
	struct interface interface;

	for (; !cursor->bad && !failed && macs[count] && count < MAX_CLIENTS; count += !failed)
		failed = find_interface(macs[count], &interface) || (pipes[count] = start(&interface)) < 0;
	error = errno;
	for (uint32_t i = 0; i < count; i++) {
		if (!failed)
			await(pipes[i], macs[i], until);
		close(pipes[i]);
	}
	free(macs);
	errno = error;
	return failed ? -1 : 0;
}
