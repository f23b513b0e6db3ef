/* What a DHCP server, or whoever plays one, sends to the agent (lease.c), for engine.c. */
#include <stdlib.h>
#include <string.h>

#include "dhcp.h"

static void check(const struct lease *lease)
{
	if (lease->type == 6)
		return;
	if (!lease->address || !lease->prefix || lease->prefix > 32 || lease->route_count > MAX_ROUTES ||
	    lease->seconds < 10 || lease->renew < 2 || lease->renew > lease->rebind ||
	    lease->rebind > lease->seconds || strlen(lease->domain) > MAX_DOMAIN || strpbrk(lease->domain, "\n ;#"))
		abort();
	for (size_t i = 0; i < lease->route_count; i++)
		if (lease->routes[i].prefix > 32)
			abort();
}

/* A packet, and the message alone: whose id and MAC are right, whatever the input says. */
void run(const uint8_t *data, size_t size)
{
	uint8_t *copy = malloc(size ? size : 1);	/* its end is the heap's: one byte too far is seen */
	memcpy(copy, data, size);
	struct lease lease;
	size_t length = size;
	const uint8_t *payload = udp_unwrap(copy, &length);

	for (int turn = 0; turn < 2; turn++) {
		const uint8_t *message = turn ? copy : payload;
		size_t given = turn ? size : length;
		uint32_t id = 0;
		uint8_t mac[6] = { 0 };

		if (message && given >= 34) {
			memcpy(&id, message + 4, 4);
			memcpy(mac, message + 28, 6);
		}
		if (message && dhcp_read(message, given, id, mac, &lease))
			check(&lease);
	}
	free(copy);
}
