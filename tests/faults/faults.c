/* Preloaded into a process: kills it, or fails a call, at the n-th call that changes something below a folder.
 *
 *   cc -shared -fPIC -o faults.so faults.c -ldl;  LD_PRELOAD=./faults.so python driver.py own kill
 *
 * faults_arm(folder, n, error, lasting): error 0 is SIGKILL, any other is what the call fails with; lasting means all
 * later calls too; n = 0 only counts, for faults_count(). */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static int target, failure, lasting;
static volatile int armed, calls;

void faults_arm(const char *folder, int n, int error, int last) {
    snprintf(root, sizeof root, "%s", folder);
    target = n, failure = error, lasting = last, calls = 0, armed = 1;
}
void faults_disarm(void) { armed = 0; }
int faults_count(void) { return calls; }

static int path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = 0;
    return length > 0;
}

static int is_below(const char *path) {
    size_t length = strlen(root);
    return !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

/* Whether a path, relative to an open directory or to the working directory, is below the folder. */
static int at_below(int dir, const char *path) {
    char start[PATH_MAX], whole[2 * PATH_MAX];
    if (!path) return 0;
    if (*path == '/') return is_below(path);
    if (dir == AT_FDCWD ? !getcwd(start, sizeof start) : !path_of(dir, start)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", start, path);
    return is_below(whole);
}

static int fd_below(int fd) {
    char path[PATH_MAX];
    return path_of(fd, path) && is_below(path);
}

/* Count a call; 1, with errno set, if it is to fail. */
static int fails(void) {
    int now = __sync_add_and_fetch(&calls, 1);
    if (!target || now < target || (now > target && !lasting)) return 0;
    if (!failure) kill(getpid(), SIGKILL);
    while (!failure) pause();
    errno = failure;
    return 1;
}

/* A function of the C library that fails where `concerned` holds and its turn has come. */
#define CALL(type, name, parameters, arguments, concerned)         \
    type name parameters {                                         \
        static type(*usual) parameters;                            \
        if (!usual) usual = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
        return armed && (concerned) && fails() ? -1 : usual arguments;   \
    }
#define OPEN(name, first, second, dir)                                              \
    int name(first const char *path, int flags, ...) {                              \
        static int (*usual)(first const char *, int, ...);                          \
        if (!usual) usual = (int (*)(first const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest;                                                               \
        va_start(rest, flags);                                                      \
        mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0;   \
        va_end(rest);                                                               \
        int changes = flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR);              \
        return armed && changes && at_below(dir, path) && fails() ? -1 : usual(second path, flags, mode); \
    }
#define COMMA ,

OPEN(open, , , AT_FDCWD)
OPEN(open64, , , AT_FDCWD)
OPEN(openat, int dir COMMA, dir COMMA, dir)
OPEN(openat64, int dir COMMA, dir COMMA, dir)
CALL(int, creat, (const char *p, mode_t m), (p, m), at_below(AT_FDCWD, p))
CALL(int, mkdir, (const char *p, mode_t m), (p, m), at_below(AT_FDCWD, p))
CALL(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m), at_below(d, p))
CALL(int, rmdir, (const char *p), (p), at_below(AT_FDCWD, p))
CALL(int, unlink, (const char *p), (p), at_below(AT_FDCWD, p))
CALL(int, unlinkat, (int d, const char *p, int f), (d, p, f), at_below(d, p))
CALL(int, link, (const char *p, const char *q), (p, q), at_below(AT_FDCWD, q))
CALL(int, linkat, (int d, const char *p, int e, const char *q, int f), (d, p, e, q, f), at_below(e, q))
CALL(int, symlink, (const char *p, const char *q), (p, q), at_below(AT_FDCWD, q))
CALL(int, rename, (const char *p, const char *q), (p, q), at_below(AT_FDCWD, p) || at_below(AT_FDCWD, q))
CALL(int, renameat, (int d, const char *p, int e, const char *q), (d, p, e, q), at_below(d, p) || at_below(e, q))
CALL(int, renameat2, (int d, const char *p, int e, const char *q, unsigned f), (d, p, e, q, f), at_below(e, q))
CALL(int, chmod, (const char *p, mode_t m), (p, m), at_below(AT_FDCWD, p))
CALL(int, ftruncate, (int d, off_t n), (d, n), fd_below(d))
CALL(int, ftruncate64, (int d, off_t n), (d, n), fd_below(d))
CALL(int, fsync, (int d), (d), fd_below(d))
CALL(int, fdatasync, (int d), (d), fd_below(d))
CALL(ssize_t, write, (int d, const void *b, size_t n), (d, b, n), fd_below(d))
CALL(ssize_t, pwrite, (int d, const void *b, size_t n, off_t o), (d, b, n, o), fd_below(d))
CALL(ssize_t, pwrite64, (int d, const void *b, size_t n, off_t o), (d, b, n, o), fd_below(d))
CALL(ssize_t, writev, (int d, const struct iovec *v, int n), (d, v, n), fd_below(d))
CALL(ssize_t, sendfile, (int d, int s, off_t *o, size_t n), (d, s, o, n), fd_below(d))
CALL(ssize_t, sendfile64, (int d, int s, off_t *o, size_t n), (d, s, o, n), fd_below(d))
CALL(ssize_t, copy_file_range, (int s, off_t *o, int d, off_t *q, size_t n, unsigned f), (s, o, d, q, n, f), fd_below(d))
