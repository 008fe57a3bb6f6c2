// Preloaded, it makes system calls on files below a directory fail at random, as disks, quotas and networks do.
//
// cc -shared -fPIC -O1 -o faults.so faults.c -ldl
//
// faults_arm(seed, per_million, kinds, root) begins, kinds being bits; faults_disarm() ends, faults_count(kind) tells how
// many calls failed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, SYNC, RENAME, CLOSE, READ, LOCK, OPEN, LINK, REMOVE, KINDS };

static atomic_int armed;
static atomic_uint_fast64_t drawn;
static atomic_uint counts[KINDS];
static uint64_t seed, per_million, chosen;
static char root[PATH_MAX];

// What each kind fails with; EINVAL of a rename says that the file system cannot swap, ENOSYS that it cannot lock.
static const int errors[KINDS][4] = {
    {EIO, ENOSPC, EDQUOT, EFBIG}, {EIO, ENOSPC, EDQUOT, EIO}, {EIO, ENOSPC, EINVAL, EACCES}, {EIO, ENOSPC, EDQUOT, EIO},
    {EIO, ESTALE, EIO, ESTALE}, {ENOLCK, ENOSYS, EIO, EINTR}, {EIO, ENOSPC, EMFILE, EACCES}, {EIO, EPERM, EMLINK, ENOSPC},
    {EIO, EBUSY, EACCES, EROFS},
};

// Calls that a command makes once or twice fail more often than those it makes by the hundred.
static const uint64_t rarity[KINDS] = {1, 4, 20, 1, 1, 20, 1, 10, 5};

void faults_arm(uint64_t with_seed, uint64_t with_rate, uint64_t kinds, const char *below) {
  seed = with_seed;
  per_million = with_rate;
  chosen = kinds;
  snprintf(root, sizeof root, "%s", below);
  atomic_store(&drawn, 0);
  for (int kind = 0; kind < KINDS; kind++) atomic_store(&counts[kind], 0);
  atomic_store(&armed, 1);
}

void faults_disarm(void) { atomic_store(&armed, 0); }

unsigned faults_count(int kind) { return kind < KINDS ? atomic_load(&counts[kind]) : 0; }

static uint64_t draw(void) {  // splitmix64 of a counter: any thread, any order
  uint64_t x = seed * 0x9e3779b97f4a7c15u + 0x9e3779b97f4a7c15u * (1 + atomic_fetch_add(&drawn, 1));
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

static int below(const char *path) { return path != NULL && strncmp(path, root, strlen(root)) == 0; }

static int on(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return below(path);
}

static int fails(int kind) {
  uint64_t number = draw();
  if (number % 1000000 >= per_million * rarity[kind] || !(chosen >> kind & 1)) return 0;
  atomic_fetch_add(&counts[kind], 1);
  errno = errors[kind][(number >> 40) % 4];
  return 1;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_ON(fd, kind) \
  if (atomic_load(&armed) && on(fd) && fails(kind)) return -1
#define FAIL_AT(path, kind) \
  if (atomic_load(&armed) && below(path) && fails(kind)) return -1

// One write in eight that does not fail is a short one.
static size_t some(int fd, size_t size) {
  return atomic_load(&armed) && size > 1 && on(fd) && draw() % 8 == 0 ? 1 + draw() % (size - 1) : size;
}

ssize_t write(int fd, const void *data, size_t size) {
  FAIL_ON(fd, WRITE);
  return REAL(write)(fd, data, some(fd, size));
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
  FAIL_ON(fd, WRITE);
  return REAL(pwrite)(fd, data, some(fd, size), offset);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
  FAIL_ON(fd, WRITE);
  return REAL(pwrite64)(fd, data, some(fd, size), offset);
}
int fsync(int fd) {
  FAIL_ON(fd, SYNC);
  return REAL(fsync)(fd);
}
int fdatasync(int fd) {
  FAIL_ON(fd, SYNC);
  return REAL(fdatasync)(fd);
}
int rename(const char *from, const char *to) {
  FAIL_AT(from, RENAME);
  return REAL(rename)(from, to);
}
int renameat(int at, const char *from, int to_at, const char *to) {
  FAIL_AT(from, RENAME);
  return REAL(renameat)(at, from, to_at, to);
}
int renameat2(int at, const char *from, int to_at, const char *to, unsigned flags) {
  FAIL_AT(from, RENAME);
  return REAL(renameat2)(at, from, to_at, to, flags);
}
int close(int fd) {
  int failing = atomic_load(&armed) && on(fd) && fails(CLOSE), code = errno;
  int result = REAL(close)(fd);
  if (failing) errno = code;
  return failing ? -1 : result;
}
ssize_t pread(int fd, void *data, size_t size, off_t offset) {
  FAIL_ON(fd, READ);
  return REAL(pread)(fd, data, size, offset);
}
ssize_t pread64(int fd, void *data, size_t size, off64_t offset) {
  FAIL_ON(fd, READ);
  return REAL(pread64)(fd, data, size, offset);
}
ssize_t preadv(int fd, const struct iovec *parts, int count, off_t offset) {
  FAIL_ON(fd, READ);
  return REAL(preadv)(fd, parts, count, offset);
}
ssize_t preadv64(int fd, const struct iovec *parts, int count, off64_t offset) {
  FAIL_ON(fd, READ);
  return REAL(preadv64)(fd, parts, count, offset);
}
ssize_t preadv2(int fd, const struct iovec *parts, int count, off_t offset, int flags) {
  FAIL_ON(fd, READ);
  return REAL(preadv2)(fd, parts, count, offset, flags);
}
ssize_t preadv64v2(int fd, const struct iovec *parts, int count, off64_t offset, int flags) {
  FAIL_ON(fd, READ);
  return REAL(preadv64v2)(fd, parts, count, offset, flags);
}
ssize_t read(int fd, void *data, size_t size) {
  FAIL_ON(fd, READ);
  return REAL(read)(fd, data, size);
}
int flock(int fd, int operation) {
  FAIL_ON(fd, LOCK);
  return ((int (*)(int, int))dlsym(RTLD_NEXT, "flock"))(fd, operation);
}
int link(const char *from, const char *to) {
  FAIL_AT(to, LINK);
  return REAL(link)(from, to);
}
int linkat(int at, const char *from, int to_at, const char *to, int flags) {
  FAIL_AT(to, LINK);
  return REAL(linkat)(at, from, to_at, to, flags);
}
int mkdir(const char *path, mode_t mode) {
  FAIL_AT(path, OPEN);
  return REAL(mkdir)(path, mode);
}
int unlink(const char *path) {
  FAIL_AT(path, REMOVE);
  return REAL(unlink)(path);
}
int rmdir(const char *path) {
  FAIL_AT(path, REMOVE);
  return REAL(rmdir)(path);
}
int unlinkat(int at, const char *path, int flags) {
  if (path[0] == '/') {
    FAIL_AT(path, REMOVE);
  } else {
    FAIL_ON(at, REMOVE);
  }
  return REAL(unlinkat)(at, path, flags);
}

#define OPENING(name)                                                \
  int name(const char *path, int flags, ...) {                       \
    va_list rest;                                                    \
    va_start(rest, flags);                                           \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                    \
    FAIL_AT(path, OPEN);                                             \
    return REAL(name)(path, flags, mode);                            \
  }
OPENING(open)
OPENING(open64)
