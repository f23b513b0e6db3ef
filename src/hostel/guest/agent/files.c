/* Children that pack a tree into a stream of entries, and unpack one.
 *
 *   entry:  u32 kind | u32 mode | u32 uid | u32 gid | i64 mtime (ns) | u64 size | string name | string link
 *           and, for a file, `size` bytes of data
 *
 * Names are relative to what was asked for; that itself has the empty name. A directory comes before
 * what is in it, and once more (LEAVE) after it. The last entry is END. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "agent.h"

enum { CHUNK = 64 << 10 };

static uint8_t chunk[CHUNK];

static void fail(const char *step, const char *path)
{
	child_fail(errno, step, path);
}

/* Packing */

static const char *pack_root;

static void write_all(const void *data, size_t size)
{
	for (const char *at = data; size;) {
		ssize_t done = write(1, at, size);
		if (done < 0)
			_exit(1);	/* the host no longer reads */
		at += done;
		size -= done;
	}
}

static uint32_t kind_of(mode_t mode)
{
	return S_ISREG(mode) ? ENTRY_FILE : S_ISDIR(mode) ? ENTRY_DIRECTORY
	     : S_ISLNK(mode) ? ENTRY_SYMLINK : ENTRY_OTHER;
}

static void write_entry(uint32_t kind, const struct stat *info, const char *name, const char *link)
{
	struct buffer entry = { 0 };

	put_u32(&entry, kind);
	put_u32(&entry, info->st_mode & 07777);
	put_u32(&entry, info->st_uid);
	put_u32(&entry, info->st_gid);
	put_u64(&entry, info->st_mtim.tv_sec * 1000000000LL + info->st_mtim.tv_nsec);
	put_u64(&entry, kind == ENTRY_FILE ? info->st_size : 0);
	put_string(&entry, name);
	put_string(&entry, link);
	write_all(entry.data, buffer_size(&entry));
	buffer_free(&entry);
}

/* Exactly as many bytes as the entry promised, whatever becomes of the file meanwhile. */
static void write_data(int fd, uint64_t size)
{
	while (size) {
		size_t most = size < CHUNK ? size : CHUNK;
		ssize_t got = read(fd, chunk, most);
		if (got < 0)
			fail("read", pack_root);
		if (!got) {
			memset(chunk, 0, most);
			got = most;
		}
		write_all(chunk, got);
		size -= got;
	}
}

static void pack_file(int fd, const struct stat *info, const char *name, uint32_t flags)
{
	write_entry(ENTRY_FILE, info, name, "");
	if (!(flags & PACK_NO_DATA))
		write_data(fd, info->st_size);
}

static void pack_entry(int directory, const char *base, char *name, size_t length, uint32_t flags);

static void pack_directory(int fd, const struct stat *info, char *name, size_t length, uint32_t flags)
{
	DIR *directory = fdopendir(fd);
	struct dirent *item;

	if (!directory)
		fail("open directory", name);
	write_entry(ENTRY_DIRECTORY, info, name, "");
	while ((item = readdir(directory))) {
		if (!strcmp(item->d_name, ".") || !strcmp(item->d_name, ".."))
			continue;
		int more = snprintf(name + length, PATH_MAX - length, "%s%s", length ? "/" : "", item->d_name);
		if (more >= (int)(PATH_MAX - length)) {
			errno = ENAMETOOLONG;
			fail("walk", name);
		}
		pack_entry(dirfd(directory), item->d_name, name, length + more, flags);
		name[length] = 0;
	}
	closedir(directory);
	write_entry(ENTRY_LEAVE, info, name, "");
}

static void pack_link(int directory, const char *base, const struct stat *info, const char *name)
{
	char link[PATH_MAX];
	ssize_t size = readlinkat(directory, base, link, sizeof link - 1);

	if (size < 0)
		return;
	link[size] = 0;
	write_entry(ENTRY_SYMLINK, info, name, link);
}

/* What vanishes between two looks is left out; what is refused ends the walk with its name. */
static void pack_entry(int directory, const char *base, char *name, size_t length, uint32_t flags)
{
	bool inner = length > 0;
	struct stat info;

	if (fstatat(directory, base, &info, inner ? AT_SYMLINK_NOFOLLOW : 0)) {
		if (inner && errno == ENOENT)
			return;
		fail("stat", inner ? name : base);
	}
	uint32_t kind = kind_of(info.st_mode);
	if (kind == ENTRY_SYMLINK) {
		pack_link(directory, base, &info, name);
		return;
	}
	if (kind == ENTRY_OTHER || (inner && (flags & PACK_SHALLOW))
	    || (kind == ENTRY_FILE && (flags & PACK_NO_DATA))) {
		write_entry(kind, &info, name, "");
		return;
	}
	int fd = openat(directory, base, O_RDONLY | O_CLOEXEC | (inner ? O_NOFOLLOW : 0));
	if (fd < 0)
		fail("open", inner ? name : base);
	if (kind == ENTRY_DIRECTORY) {
		pack_directory(fd, &info, name, length, flags);
	} else {
		pack_file(fd, &info, name, flags);
		close(fd);
	}
}

_Noreturn void child_pack(const uint8_t *message, size_t size)
{
	struct cursor cursor = { message, message + size, false };
	uint32_t flags = take_u32(&cursor);
	static char name[PATH_MAX];
	struct stat none = { 0 };

	pack_root = take_string(&cursor);
	if (cursor.bad)
		child_fail(EBADMSG, "request", "");
	pack_entry(AT_FDCWD, pack_root, name, 0, flags);
	write_entry(ENTRY_END, &none, "", "");
	_exit(0);
}

/* Unpacking */

struct entry {
	uint32_t kind, mode, uid, gid;
	int64_t mtime;
	uint64_t size;
	char name[PATH_MAX], link[PATH_MAX];
};

static void read_all(void *data, size_t size)
{
	for (char *at = data; size;) {
		ssize_t got = read(0, at, size);
		if (got <= 0)
			child_fail(EPIPE, "unpack", "the stream ended too early");
		at += got;
		size -= got;
	}
}

static void read_string(char *text)
{
	uint8_t raw[4];
	struct cursor cursor = { raw, raw + 4, false };

	read_all(raw, sizeof raw);
	uint32_t size = take_u32(&cursor);
	if (size >= PATH_MAX)
		child_fail(ENAMETOOLONG, "unpack", "");
	read_all(text, size + 1);
	text[size] = 0;
}

static void read_entry(struct entry *entry)
{
	uint8_t raw[32];
	struct cursor cursor = { raw, raw + sizeof raw, false };

	read_all(raw, sizeof raw);
	entry->kind = take_u32(&cursor);
	entry->mode = take_u32(&cursor);
	entry->uid = take_u32(&cursor);
	entry->gid = take_u32(&cursor);
	entry->mtime = take_u64(&cursor);
	entry->size = take_u64(&cursor);
	read_string(entry->name);
	read_string(entry->link);
}

static void read_data(int fd, uint64_t size, const char *path)
{
	while (size) {
		size_t most = size < CHUNK ? size : CHUNK;
		read_all(chunk, most);
		for (size_t at = 0; at < most;) {
			ssize_t done = write(fd, chunk + at, most - at);
			if (done < 0)
				fail("write", path);
			at += done;
		}
		size -= most;
	}
}

static void apply(const struct entry *entry, const char *path)
{
	struct timespec times[2] = { { .tv_nsec = UTIME_OMIT }, { .tv_nsec = UTIME_OMIT } };
	uint32_t mode = entry->kind == ENTRY_DIRECTORY ? entry->mode | 0700 : entry->mode;

	if ((entry->uid != KEEP || entry->gid != KEEP) && lchown(path, entry->uid, entry->gid))
		fail("chown", path);
	if (entry->mode != KEEP && entry->kind != ENTRY_SYMLINK && chmod(path, mode))
		fail("chmod", path);
	if (entry->mtime == KEEP_TIME)
		return;
	times[1].tv_sec = entry->mtime / 1000000000;
	times[1].tv_nsec = entry->mtime % 1000000000;
	if (times[1].tv_nsec < 0) {
		times[1].tv_nsec += 1000000000;
		times[1].tv_sec--;
	}
	if (utimensat(AT_FDCWD, path, times, AT_SYMLINK_NOFOLLOW))
		fail("set the time of", path);
}

static void unpack_file(const struct entry *entry, const char *path)
{
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);

	if (fd < 0)
		fail("open", path);
	read_data(fd, entry->size, path);
	if (close(fd))
		fail("close", path);
}

static void unpack_directory(const char *path)
{
	struct stat info;

	if (!mkdir(path, 0777))
		return;
	int error = errno;
	if (error == EEXIST && !stat(path, &info) && S_ISDIR(info.st_mode))
		return;
	child_fail(error, "make directory", path);
}

static void unpack_entry(const struct entry *entry, const char *path)
{
	switch (entry->kind) {
	case ENTRY_FILE:
		unpack_file(entry, path);
		break;
	case ENTRY_DIRECTORY:
		unpack_directory(path);
		break;
	case ENTRY_SYMLINK:
		unlink(path);
		if (symlink(entry->link, path))
			fail("make link", path);
		break;
	case ENTRY_LEAVE:
		break;
	default:
		child_fail(EBADMSG, "unpack", path);
	}
	apply(entry, path);
}

_Noreturn void child_unpack(const uint8_t *message, size_t size)
{
	struct cursor cursor = { message, message + size, false };
	const char *base = take_string(&cursor), *inside = take_string(&cursor);
	static char root[PATH_MAX], path[2 * PATH_MAX + 2];
	static struct entry entry;
	struct stat info;

	if (cursor.bad)
		child_fail(EBADMSG, "request", "");
	bool into = *inside && !stat(base, &info) && S_ISDIR(info.st_mode);
	if (snprintf(root, sizeof root, "%s%s%s", base, into ? "/" : "", into ? inside : "") >= PATH_MAX)
		child_fail(ENAMETOOLONG, "unpack", base);
	umask(022);
	for (read_entry(&entry); entry.kind != ENTRY_END; read_entry(&entry)) {
		snprintf(path, sizeof path, "%s%s%s", root, *entry.name ? "/" : "", entry.name);
		unpack_entry(&entry, path);
	}
	_exit(0);
}
