// Loaded before libc: file operations below a folder are counted, and the n-th kills the process or fails.
//
// What is counted: everything that changes something below the folder, by whatever library it comes (Python, Rust's
// safetensors, torch's C++ streams): opening for writing, writing, syncing, truncating, making, renaming, removing.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = 0 };  // else the errno that operations fail with

static char folder[PATH_MAX];
static long left = -1, counted;
static int failure;

// From now on the n-th operation below `path` fails: by SIGKILL, or with `error`; n < 0: none does.
void faults_arm(const char* path, long n, int error) {
  snprintf(folder, sizeof folder, "%s", path);
  left = n;
  counted = 0;
  failure = error;
}

long faults_counted(void) { return counted; }

// Whether the operation is to fail; `takes_room`: it is one that a full disk refuses.
static int fails(const char* path, int takes_room) {
  if (!folder[0] || !path || strncmp(path, folder, strlen(folder)) != 0) return 0;
  counted++;
  if (left < 0 || counted < left) return 0;
  if (failure == KILL) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  if (failure == ENOSPC ? !takes_room : counted != left) return 0;  // a full disk stays full
  errno = failure;
  return 1;
}

static int fails_fd(int fd, int takes_room) {
  char link[64], path[PATH_MAX];
  if (!folder[0]) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0) return 0;
  path[n] = 0;
  return fails(path, takes_room);
}

static int fails_at(int at, const char* path, int takes_room) {
  char link[64], whole[PATH_MAX];
  if (path && path[0] == '/') return fails(path, takes_room);
  if (!folder[0] || at == AT_FDCWD || !path) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", at);
  ssize_t n = readlink(link, whole, sizeof whole - 1);
  if (n < 0) return 0;
  snprintf(whole + n, sizeof whole - n, "/%s", path);
  return fails(whole, takes_room);
}

#define REAL(name) static __typeof__(name)* real; if (!real) real = (__typeof__(name)*)dlsym(RTLD_NEXT, #name)

static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

#define OPEN(name)                                                   \
  int name(const char* path, int flags, ...) {                       \
    REAL(name);                                                      \
    va_list more;                                                    \
    va_start(more, flags);                                           \
    mode_t mode = va_arg(more, mode_t);                              \
    va_end(more);                                                    \
    if (writes(flags) && fails(path, 1)) return -1;                  \
    return real(path, flags, mode);                                  \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                 \
  int name(int at, const char* path, int flags, ...) {               \
    REAL(name);                                                      \
    va_list more;                                                    \
    va_start(more, flags);                                           \
    mode_t mode = va_arg(more, mode_t);                              \
    va_end(more);                                                    \
    if (writes(flags) && fails_at(at, path, 1)) return -1;           \
    return real(at, path, flags, mode);                              \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                  \
  FILE* name(const char* path, const char* mode) {                   \
    REAL(name);                                                      \
    if (mode[0] != 'r' && fails(path, 1)) return NULL;               \
    return real(path, mode);                                         \
  }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void* data, size_t n) { REAL(write); return fails_fd(fd, 1) ? -1 : real(fd, data, n); }
ssize_t writev(int fd, const struct iovec* v, int n) { REAL(writev); return fails_fd(fd, 1) ? -1 : real(fd, v, n); }
ssize_t pwrite64(int fd, const void* data, size_t n, off64_t at) {
  REAL(pwrite64);
  return fails_fd(fd, 1) ? -1 : real(fd, data, n, at);
}
int fsync(int fd) { REAL(fsync); return fails_fd(fd, 1) ? -1 : real(fd); }
int fdatasync(int fd) { REAL(fdatasync); return fails_fd(fd, 1) ? -1 : real(fd); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); return fails_fd(fd, 1) ? -1 : real(fd, n); }
int mkdir(const char* path, mode_t mode) { REAL(mkdir); return fails(path, 1) ? -1 : real(path, mode); }
int rename(const char* from, const char* to) { REAL(rename); return fails(from, 0) ? -1 : real(from, to); }
int unlink(const char* path) { REAL(unlink); return fails(path, 0) ? -1 : real(path); }
int rmdir(const char* path) { REAL(rmdir); return fails(path, 0) ? -1 : real(path); }
int unlinkat(int at, const char* path, int flags) {
  REAL(unlinkat);
  return fails_at(at, path, 0) ? -1 : real(at, path, flags);
}
