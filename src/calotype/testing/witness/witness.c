/*
 * The witness: a guest that notices when its RAM and its disks are not of one instant.
 *
 * It counts rounds, n, in memory. Each disk begins with a ring of sectors, and memory holds a copy
 * of every ring as it was last written. A round is
 *
 *     1. read every ring back, past all caches, and compare it with memory;
 *     2. rewrite a few pages of the pool, and check a few others;
 *     3. write n + 1 into the next slot of each ring, one disk after the other.
 *
 * So between two rounds RAM and all disks agree, and within step 3 they differ by what one thread
 * knows to be under way. A machine put together from RAM of one instant and a disk of another breaks
 * this in the first round after it, whichever of them is the older one. A single counter sector
 * would not do: a disk swapped between step 1 and step 3 would be overwritten unseen. Of a ring, at
 * most one slot is lost that way and the others testify.
 *
 * The pool is RAM full of data that does not compress, each page made from its number, its
 * generation and a seed. Generations are kept elsewhere in memory, so a page that is stale, swapped
 * or damaged is found by making it again. The rounds walk through the pool slowly; `check` walks
 * through all of it at once.
 *
 * A difference is told once, in one line, and counted for good; then memory takes over what the disk
 * holds (or the page is made anew), so that the next difference stands out and none is counted twice.
 * An I/O error is told as well, and the transfer repeated until it succeeds: what is on the disk
 * is never in doubt.
 *
 * Said on the console, a line each:
 *
 *     BOOT id=UUID                                       another id: the guest was booted again
 *     READY n=0 disks=D pages=P                          once, before the first round
 *     TICK n=N mono_us=T bad=B                           about every 20 ms of the guest's time
 *     INCONSISTENT n=N disk=D slot=S expected=E found=F slots=C     C slots differ, this is the
 *                                                        first; `found=?` is no sector of ours
 *     INCONSISTENT n=N page=P                            this page is not what was written
 *     CHECKED n=N pages=P bad=B                          the answer to `check`
 *     PAUSED n=N / GOING n=N / DIRTY n=N pages=K         the answers to the others
 *     FAILED n=N disk=D errno=E                          a transfer failed and is repeated
 *
 * where B counts all differences since the start. Understood, a line each: `check` (everything, at
 * once), `pause` and `go` (a guest without load), `dirty K` (pages rewritten in each round).
 *
 * From the kernel's command line: witness.disks=vda,vdb  witness.ram=MiB  witness.seed=N
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

enum {
    SLOTS = 64,             /* sectors in a ring */
    MAX_DISKS = 32,
    PAGE_BYTES = 4096,
    PAGES_PER_MIB = 256,
    CHECKED_PER_ROUND = 4,  /* pages of the pool */
    ROUNDS_PER_FLUSH = 16,
    TICK_US = 20000,
    PATIENCE_US = 10000000, /* until a disk has appeared */
};

/* "WITNSECT" and "WITNPAGE", as they read in a dump. */
static const uint64_t sector_magic = 0x544345534e544957;
static const uint64_t page_magic = 0x454741504e544957;

struct sector {
    uint64_t magic;
    uint32_t disk, slot;
    uint64_t n;
    uint64_t check; /* of the above */
    uint64_t rest[60];
};

struct ring {
    struct sector slots[SLOTS];
};

struct page {
    uint64_t magic, seed, number, generation;
    uint64_t noise[508];
};

_Static_assert(sizeof(struct sector) == 512, "a sector of a disk");
_Static_assert(sizeof(struct page) == PAGE_BYTES, "a page of RAM");

struct disk {
    int fd;
    struct ring *written; /* the ring as it was last written */
};

static uint64_t n;   /* rounds */
static uint64_t bad; /* differences found since the start */

static struct disk disks[MAX_DISKS];
static uint32_t disk_count;

static struct page *pool;
static uint64_t *generations; /* of each page in the pool */
static uint64_t page_count, seed = 1, dirty_per_round = 4, next_checked;

/* --- speaking ------------------------------------------------------------------------------- */

/* One write for one line, so that nothing can stand between its parts. */
__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    line[length++] = '\n';
    for (int done = 0; done < length;) {
        ssize_t step = write(STDOUT_FILENO, line + done, length - done);
        if (step > 0)
            done += step;
    }
}

static uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* --- disks ---------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

static uint64_t check_of(const struct sector *sector)
{
    return mix(mix(mix(sector->magic) + sector->disk) + sector->slot) + mix(sector->n);
}

static bool is_ours(const struct sector *sector)
{
    return sector->magic == sector_magic && sector->check == check_of(sector);
}

static bool is_blank(const struct sector *sector)
{
    static const struct sector blank;
    return memcmp(sector, &blank, sizeof blank) == 0;
}

typedef ssize_t transfer(int fd, void *bytes, size_t count, off_t offset);

static ssize_t writing(int fd, void *bytes, size_t count, off_t offset)
{
    return pwrite(fd, bytes, count, offset);
}

static ssize_t flushing(int fd, void *bytes, size_t count, off_t offset)
{
    (void)bytes, (void)count, (void)offset;
    return fdatasync(fd);
}

static void persist(transfer *attempt, uint32_t disk, void *bytes, size_t count, off_t offset)
{
    for (;;) {
        errno = 0;
        if (attempt(disks[disk].fd, bytes, count, offset) == (ssize_t)count)
            return;
        say("FAILED n=%lu disk=%u errno=%d", n, disk, errno);
        usleep(100000);
    }
}

static void compare_disk(uint32_t disk)
{
    static struct ring found __attribute__((aligned(PAGE_BYTES)));
    struct ring *expected = disks[disk].written;
    uint32_t first = SLOTS, count = 0;

    persist(pread, disk, &found, sizeof found, 0);
    if (memcmp(&found, expected, sizeof found) == 0)
        return;
    for (uint32_t slot = SLOTS; slot-- > 0;) {
        if (memcmp(&found.slots[slot], &expected->slots[slot], sizeof(struct sector)) != 0) {
            first = slot;
            count++;
        }
    }
    bad += count;
    char told[24] = "?";
    if (is_ours(&found.slots[first]) || is_blank(&found.slots[first]))
        snprintf(told, sizeof told, "%lu", found.slots[first].n);
    say("INCONSISTENT n=%lu disk=%u slot=%u expected=%lu found=%s slots=%u",
        n, disk, first, expected->slots[first].n, told, count);
    *expected = found;
}

static void write_disk(uint32_t disk)
{
    uint32_t slot = n % SLOTS;
    struct sector *sector = &disks[disk].written->slots[slot];
    *sector = (struct sector){.magic = sector_magic, .disk = disk, .slot = slot, .n = n};
    sector->check = check_of(sector);
    persist(writing, disk, sector, sizeof *sector, (off_t)(slot * sizeof *sector));
    if (n % ROUNDS_PER_FLUSH == 0)
        persist(flushing, disk, NULL, 0, 0);
}

static void open_disk(const char *name)
{
    char path[64];
    int fd;
    snprintf(path, sizeof path, "/dev/%s", name);
    uint64_t give_up_us = now_us() + PATIENCE_US;
    while ((fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC)) < 0 && now_us() < give_up_us)
        usleep(5000);
    disks[disk_count] = (struct disk){
        .fd = fd,
        .written = aligned_alloc(PAGE_BYTES, sizeof(struct ring)),
    };
    memset(disks[disk_count].written, 0, sizeof(struct ring));
    persist(writing, disk_count, disks[disk_count].written, sizeof(struct ring), 0);
    disk_count++;
}

/* --- the pool ------------------------------------------------------------------------------- */

static void make_page(struct page *page, uint64_t number)
{
    uint64_t generation = generations[number];
    uint64_t x = mix(mix(mix(seed) + number) + generation) | 1;
    *page = (struct page){page_magic, seed, number, generation, {0}};
    for (size_t i = 0; i < sizeof page->noise / sizeof *page->noise; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        page->noise[i] = x;
    }
}

static void renew_page(uint64_t number)
{
    generations[number]++;
    make_page(&pool[number], number);
}

static void check_page(uint64_t number)
{
    static struct page expected;
    make_page(&expected, number);
    if (memcmp(&expected, &pool[number], sizeof expected) == 0)
        return;
    bad++;
    say("INCONSISTENT n=%lu page=%lu", n, number);
    renew_page(number);
}

static void make_pool(uint64_t mib)
{
    page_count = mib * PAGES_PER_MIB;
    if (page_count == 0)
        return;
    generations = calloc(page_count, sizeof *generations);
    pool = mmap(NULL, page_count * PAGE_BYTES, PROT_READ | PROT_WRITE,
                MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (generations == NULL || pool == MAP_FAILED) {
        say("FAILED n=0 pool errno=%d", errno);
        exit(1);
    }
    for (uint64_t number = 0; number < page_count; number++)
        make_page(&pool[number], number);
}

/* --- rounds --------------------------------------------------------------------------------- */

static void play_round(void)
{
    for (uint32_t disk = 0; disk < disk_count; disk++)
        compare_disk(disk);
    for (uint64_t i = 0; page_count && i < dirty_per_round; i++) {
        uint64_t number = mix(n * 0x10001 + i) % page_count;
        check_page(number); /* or what was wrong with it would be overwritten unseen */
        renew_page(number);
    }
    for (uint64_t i = 0; page_count && i < CHECKED_PER_ROUND; i++)
        check_page(next_checked++ % page_count);
    n++;
    for (uint32_t disk = 0; disk < disk_count; disk++)
        write_disk(disk);
}

static void check_everything(void)
{
    for (uint32_t disk = 0; disk < disk_count; disk++)
        compare_disk(disk);
    for (uint64_t number = 0; number < page_count; number++)
        check_page(number);
    say("CHECKED n=%lu pages=%lu bad=%lu", n, page_count, bad);
}

/* --- listening ------------------------------------------------------------------------------ */

static bool is_paused;

static void obey(const char *line)
{
    if (strcmp(line, "check") == 0) {
        check_everything();
    } else if (strcmp(line, "pause") == 0) {
        is_paused = true;
        say("PAUSED n=%lu", n);
    } else if (strcmp(line, "go") == 0) {
        is_paused = false;
        say("GOING n=%lu", n);
    } else if (sscanf(line, "dirty %lu", &dirty_per_round) == 1) {
        say("DIRTY n=%lu pages=%lu", n, dirty_per_round);
    }
}

/* Obey what the console says; a paused witness waits for it without any load. */
static void listen(void)
{
    static char line[64];
    static size_t length;
    struct pollfd console = {.fd = STDIN_FILENO, .events = POLLIN};

    do {
        char letter;
        while (poll(&console, 1, is_paused ? -1 : 0) > 0 && read(console.fd, &letter, 1) == 1) {
            if (letter == '\n' || letter == '\r') {
                line[length] = '\0';
                length = 0;
                obey(line);
            } else if (length < sizeof line - 1) {
                line[length++] = letter;
            }
        }
    } while (is_paused);
}

static void make_console_raw(void)
{
    struct termios console;
    if (tcgetattr(STDIN_FILENO, &console) == 0) {
        cfmakeraw(&console);
        tcsetattr(STDIN_FILENO, TCSANOW, &console);
    }
}

/* --- beginning ------------------------------------------------------------------------------ */

static void read_line(const char *path, char *line, int bytes)
{
    FILE *file = fopen(path, "r");
    if (file == NULL || fgets(line, bytes, file) == NULL)
        *line = '\0';
    line[strcspn(line, "\n")] = '\0';
    if (file != NULL)
        fclose(file);
}

int main(void)
{
    char boot_id[64], words[4096], *rest, *names = "", *name;
    uint64_t ram_mib = 32;

    make_console_raw();
    read_line("/proc/sys/kernel/random/boot_id", boot_id, sizeof boot_id);
    say("\nBOOT id=%s", boot_id); /* a reset may have cut a line in two */

    read_line("/proc/cmdline", words, sizeof words);
    for (char *word = strtok_r(words, " ", &rest); word; word = strtok_r(NULL, " ", &rest)) {
        if (strncmp(word, "witness.disks=", 14) == 0)
            names = word + 14;
        sscanf(word, "witness.ram=%lu", &ram_mib);
        sscanf(word, "witness.seed=%lu", &seed);
    }
    make_pool(ram_mib);
    while ((name = strsep(&names, ",")) != NULL)
        if (*name && disk_count < MAX_DISKS)
            open_disk(name);
    say("READY n=0 disks=%u pages=%lu", disk_count, page_count);

    for (uint64_t told_us = 0;;) {
        play_round();
        uint64_t us = now_us();
        if (us - told_us >= TICK_US) {
            say("TICK n=%lu mono_us=%lu bad=%lu", n, us, bad);
            told_us = us;
        }
        listen();
    }
}
