// SPDX-License-Identifier: Apache-2.0
//
// A guest that does to the devices what no driver does. It runs in place of the kernel, without interrupts, polls, tells
// on the serial port what it is at, and resets itself at the end. The host has to survive it, and after each attack a
// reset has to bring the device back to work: what does not is told in a line with FAIL.
//
// With `hostile=long` on the command line there is more of everything, twice: devices are reset a thousand times in all.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

extern u32 start_info;
extern u8 trampoline[], trampoline_end[];

// What the machine has where: vmm/src/arch/x86_64/layout.rs.
#define SLOTS 0xd0000000u
#define SLOT_COUNT 11
#define IOAPIC 0xfec00000u
#define LAPIC 0xfee00000u
#define UART 0x3f8
#define RESET_PORT 0x64
#define TRAMPOLINE 0x8000u

// virtio 1.2, 4.2.2.
#define DEVICE_ID 0x008
#define DEVICE_FEATURES 0x010
#define DEVICE_FEATURES_SELECT 0x014
#define DRIVER_FEATURES 0x020
#define DRIVER_FEATURES_SELECT 0x024
#define QUEUE_SELECT 0x030
#define QUEUE_SIZE_MAX 0x034
#define QUEUE_SIZE 0x038
#define QUEUE_READY 0x044
#define QUEUE_NOTIFY 0x050
#define STATUS 0x070
#define QUEUE_DESC 0x080
#define QUEUE_DRIVER 0x090
#define QUEUE_DEVICE 0x0a0

#define NEEDS_RESET 64u
#define DRIVER_OK 15u

#define ID_NET 1
#define ID_RNG 4
#define ID_BALLOON 5
#define ID_VSOCK 19
#define ID_FS 26

#define NEXT 1
#define WRITE 2
#define INDIRECT 4

struct desc { u64 addr; u32 len; u16 flags; u16 next; };
struct avail { u16 flags; volatile u16 idx; u16 ring[1024]; };
struct used_entry { u32 id; u32 len; };
struct used { u16 flags; volatile u16 idx; struct used_entry ring[1024]; };

#define QUEUES 8
struct ring {
    struct desc desc[1024];
    struct avail avail __attribute__((aligned(4096)));
    struct used used __attribute__((aligned(4096)));
} __attribute__((aligned(4096)));

// Far above the program and in this order, because devices overwrite or discard what lies behind a buffer.
static struct ring *const rings = (struct ring *)0x2000000;
static struct desc *const table = (struct desc *)0x2800000;
#define TABLE_LENGTH 2048
// What descriptors point to.
static u8 *const buffer = (u8 *)0x3000000;
#define BUFFER_SIZE (1 << 20)

static u64 memory_end;
static int long_run;

// ---- Ports, registers, text ----

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static u8 in8(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static u64 tsc(void) { u32 low, high; __asm__ volatile("rdtsc" : "=a"(low), "=d"(high)); return (u64)high << 32 | low; }
// Not PAUSE, which may leave the guest. Neither does anything else here that is done often: each exit costs emulated hosts
// a third of a millisecond.
static void relax(void) { __asm__ volatile("" : : : "memory"); }
static void fence(void) { __asm__ volatile("mfence" : : : "memory"); }

void *memset(void *to, int value, unsigned long count)
{
    for (u8 *byte = to; count--; byte++)
        *(volatile u8 *)byte = value;
    return to;
}

void *memcpy(void *to, const void *from, unsigned long count)
{
    u8 *target = to;
    for (const u8 *source = from; count--; target++, source++)
        *(volatile u8 *)target = *source;
    return to;
}

static void say(const char *text) { for (; *text; text++) out8(UART, *text); }

static void say_number(u64 number)
{
    char digits[24], *at = digits + sizeof digits - 1;
    for (*at = 0; number || !at[0]; number /= 10)
        *--at = '0' + number % 10;
    say(at);
}

static void tell(const char *what, u64 number) { say(what); say(" "); say_number(number); say("\n"); }

static u32 get(u32 base, u32 offset) { return *(volatile u32 *)(u64)(base + offset); }
static void set(u32 base, u32 offset, u32 value) { *(volatile u32 *)(u64)(base + offset) = value; }

static void set64(u32 base, u32 offset, u64 value)
{
    set(base, offset, value);
    // After a reset it is zero.
    if (value >> 32)
        set(base, offset + 4, value >> 32);
}

static void wait(u32 turns) { for (; turns; turns--) relax(); }

static u64 seed = 0x2545f4914f6cdd1d;
static u32 chance(u32 limit) { seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17; return (seed >> 11) % limit; }

// ---- A driver ----

struct device { u32 base, id, queues; u16 size[QUEUES]; u16 next[QUEUES]; };

static void negotiate(u32 base)
{
    set(base, STATUS, 0);
    set(base, STATUS, 1);
    set(base, STATUS, 3);
    for (u32 half = 0; half < 2; half++) {
        set(base, DEVICE_FEATURES_SELECT, half);
        u32 features = get(base, DEVICE_FEATURES);
        // Without VIRTIO_RING_F_EVENT_IDX, so that each buffer is told of.
        if (half == 0)
            features &= ~(1u << 29);
        set(base, DRIVER_FEATURES_SELECT, half);
        set(base, DRIVER_FEATURES, features);
    }
    set(base, STATUS, 11);
}

static void set_queue(u32 base, u32 queue, u32 size, u64 desc, u64 avail, u64 used)
{
    set(base, QUEUE_SELECT, queue);
    set(base, QUEUE_SIZE, size);
    set64(base, QUEUE_DESC, desc);
    set64(base, QUEUE_DRIVER, avail);
    set64(base, QUEUE_DEVICE, used);
    set(base, QUEUE_READY, 1);
}

static void clear_queue(struct device *device, u32 queue)
{
    rings[queue].avail.flags = rings[queue].avail.idx = 0;
    rings[queue].used.flags = rings[queue].used.idx = 0;
    device->next[queue] = 0;
}

// Status after DRIVER_OK.
static u32 start(struct device *device)
{
    negotiate(device->base);
    for (u32 queue = 0; queue < device->queues; queue++) {
        clear_queue(device, queue);
        set_queue(device->base, queue, device->size[queue], (u64)rings[queue].desc, (u64)&rings[queue].avail,
                  (u64)&rings[queue].used);
    }
    set(device->base, STATUS, 15);
    return get(device->base, STATUS);
}

static void put(struct device *device, u32 queue, u16 head)
{
    struct avail *avail = &rings[queue].avail;
    avail->ring[device->next[queue]++ % device->size[queue]] = head;
    fence();
    avail->idx = device->next[queue];
}

static void kick(struct device *device, u32 queue) { fence(); set(device->base, QUEUE_NOTIFY, queue); }

static void describe(u32 queue, u16 index, const void *address, u32 length, u16 flags, u16 next)
{
    rings[queue].desc[index] = (struct desc){ (u64)address, length, flags, next };
}

// Waits until the device has used `count` chains of a queue or is broken; a while at most, since a hostile chain may
// also be just ignored.
static int settle(struct device *device, u32 queue, u16 count)
{
    for (int look = 0; look < 200; look++) {
        for (u32 turn = 0; turn < 200000; turn++)
            if (rings[queue].used.idx >= count)
                return 1;
        if (get(device->base, STATUS) & NEEDS_RESET)
            return 0;
    }
    return 0;
}

static u32 request_queue(struct device *device) { return device->id == ID_FS || device->id == ID_VSOCK ? 1 : 0; }

static u32 failures;

static void fail(struct device *device, const char *what)
{
    failures++;
    say("FAIL ");
    say(what);
    tell(": device", device->id);
}

// After whatever has been done: the device starts, and the entropy device, which needs no host side, works.
static void must_work(struct device *device, const char *after)
{
    if (start(device) != DRIVER_OK)
        fail(device, after);
    if (device->id == ID_RNG) {
        memset(buffer, 0, 64);
        describe(0, 0, buffer, 64, WRITE, 0);
        put(device, 0, 0);
        kick(device, 0);
        u64 sum = 0;
        int done = settle(device, 0, 1);
        for (int byte = 0; byte < 64; byte++)
            sum += buffer[byte];
        if (!done || rings[0].used.ring[0].len != 64 || sum == 0)
            fail(device, after);
    }
    set(device->base, STATUS, 0);
    if (get(device->base, STATUS) != 0)
        fail(device, after);
}

// ---- Attacks ----

static void registers(struct device *device)
{
    static const u8 phases[] = { 15, 11, 128, 0 };
    u32 base = device->base;
    for (u32 phase = 0; phase < (long_run ? sizeof phases : 2); phase++) {
        set(base, STATUS, 0);
        if (phases[phase] >= 11)
            negotiate(base);
        set(base, STATUS, phases[phase]);
        for (u32 offset = 0; offset < 0x120; offset += long_run ? 3 : 4) {
            volatile u8 *address = (volatile u8 *)(u64)(base + offset);
            switch (chance(4)) {
            case 0: (void)*address; break;
            case 1: (void)*(volatile u16 *)address; break;
            case 2: (void)*(volatile u64 *)address; break;
            }
            (void)*(volatile u32 *)address;
            if ((offset & ~3u) == STATUS || (offset & ~3u) == STATUS - 4)
                continue;
            switch (chance(4)) {
            case 0: *address = 0xff; break;
            case 1: *(volatile u16 *)address = 0xffff; break;
            case 2: *(volatile u64 *)address = ~0ull; break;
            }
            *(volatile u32 *)address = chance(2) ? 0xffffffff : offset;
        }
        for (u32 select = 0; select < 70000; select += 6999) {
            set(base, QUEUE_SELECT, select);
            (void)get(base, QUEUE_SIZE_MAX);
            set(base, QUEUE_READY, select & 3);
            set(base, DEVICE_FEATURES_SELECT, select);
            (void)get(base, DEVICE_FEATURES);
            set(base, QUEUE_NOTIFY, select);
        }
        // Bits that come out of order, or are taken back.
        for (u32 bit = 0; bit < 32; bit++)
            set(base, STATUS, 1u << bit);
    }
    must_work(device, "registers");
}

static void addresses(struct device *device)
{
    u64 places[] = { 0, 1, memory_end - 1, memory_end - 16, memory_end, SLOTS, IOAPIC, 0xc0000000ull, 1ull << 32,
                     ~0ull, ~0ull - 15, ~0ull - 4095, 1ull << 63, 1ull << 52 };
    u32 count = sizeof places / sizeof *places;
    u16 sizes[] = { 0, 1, 3, 8, 0x7fff, 0x8000, 0xffff };
    for (u32 place = 0; place < count; place += long_run ? 1 : 3)
        for (u32 which = 0; which < 3; which++) {
            negotiate(device->base);
            for (u32 queue = 0; queue < device->queues; queue++) {
                clear_queue(device, queue);
                u64 where[3] = { (u64)rings[queue].desc, (u64)&rings[queue].avail, (u64)&rings[queue].used };
                where[which] = places[place];
                u16 size = chance(2) ? device->size[queue] : sizes[chance(7)];
                set_queue(device->base, queue, size, where[0], where[1], where[2]);
            }
            set(device->base, STATUS, 15);
            for (u32 queue = 0; queue < device->queues; queue++)
                kick(device, queue);
            // Writes to a queue that is in use.
            set_queue(device->base, 0, 4, ~0ull, ~0ull, ~0ull);
        }
    must_work(device, "addresses");
}

#define RINGS 20

// The rings of virtio 1.2, 2.7, broken in one way each. `queue` has them.
static void break_ring(struct device *device, u32 queue, int kind)
{
    u16 size = device->size[queue];
    u16 way = queue == request_queue(device) && device->id != ID_RNG && device->id != ID_BALLOON ? 0 : WRITE;
    // Not where the program is: the balloon may discard it.
    void *upper = (void *)(memory_end / 2);
    switch (kind) {
    case 0: // An indirect table in an indirect table.
        table[0] = (struct desc){ (u64)&table[16], 64, INDIRECT, 0 };
        table[16] = (struct desc){ (u64)buffer, 64, WRITE, 0 };
        describe(queue, 0, table, 16, INDIRECT, 0);
        break;
    case 1: // A loop, of one and of two.
        describe(queue, 0, buffer, 16, NEXT | way, 0);
        describe(queue, 1, buffer, 16, NEXT | way, 2);
        describe(queue, 2, buffer, 16, NEXT | way, 1);
        put(device, queue, 1);
        break;
    case 2: // The next descriptor is outside.
        describe(queue, 0, buffer, 16, NEXT | way, size);
        break;
    case 3: // Longer than the queue, by an indirect table that leads back.
        for (u32 index = 0; index < TABLE_LENGTH; index++)
            table[index] = (struct desc){ (u64)buffer, 1, NEXT | way, (u16)(index + 1) };
        describe(queue, 0, table, TABLE_LENGTH * sizeof *table, INDIRECT, 0);
        break;
    case 4: // Nothing.
        describe(queue, 0, buffer, 0, way, 0);
        break;
    case 5: // More than there can be.
        describe(queue, 0, buffer, ~0u, way, 0);
        break;
    case 6: // More than 4 GiB in all.
        for (u16 index = 0; index < 8; index++)
            describe(queue, index, upper, (u32)(memory_end / 2), index < 7 ? NEXT | way : way, index + 1);
        for (u32 index = 0; index < 1024; index++)
            table[index] = (struct desc){ (u64)upper, (u32)(memory_end / 2), index < 1023 ? NEXT | way : way,
                                          (u16)(index + 1) };
        describe(queue, 8, table, 1024 * 16, INDIRECT, 0);
        put(device, queue, 8);
        break;
    case 7: // The available index jumps.
        describe(queue, 0, buffer, 64, way, 0);
        device->next[queue] += size + 1;
        break;
    case 8: // The same chain twice.
        describe(queue, 0, buffer, 64, way, 0);
        put(device, queue, 0);
        break;
    case 9: // What the device reads is for writing, and the other way round.
        describe(queue, 0, buffer, 4096, way ^ WRITE, 0);
        break;
    case 10: // For reading behind for writing.
        describe(queue, 0, buffer, 64, NEXT | WRITE, 1);
        describe(queue, 1, buffer, 64, 0, 0);
        break;
    case 11: // Across the end of memory.
        describe(queue, 0, (void *)(memory_end - 8), 16, way, 0);
        break;
    case 12: // The devices themselves, and nothing at all.
        describe(queue, 0, (void *)(u64)SLOTS, 4096, NEXT | way, 1);
        describe(queue, 1, (void *)~0ull, 16, way, 0);
        break;
    case 13: // The rings.
        describe(queue, 0, &rings[queue], sizeof rings[queue], way, 0);
        break;
    case 14: // A head outside.
        describe(queue, 0, buffer, 64, way, 0);
        put(device, queue, size);
        put(device, queue, 0xffff);
        break;
    case 15: // An indirect table of odd size, empty, outside, too large.
        describe(queue, 0, table, 17, INDIRECT, 0);
        describe(queue, 1, table, 0, INDIRECT, 0);
        describe(queue, 2, (void *)(memory_end - 16), 64, INDIRECT, 0);
        describe(queue, 3, table, ~15u, INDIRECT, 0);
        put(device, queue, 1);
        put(device, queue, 2);
        put(device, queue, 3);
        break;
    case 16: // Indirect and more behind it.
        table[0] = (struct desc){ (u64)buffer, 64, way, 0 };
        describe(queue, 0, table, 16, INDIRECT | NEXT, 1);
        describe(queue, 1, buffer, 64, way, 0);
        break;
    case 17: // Flags that do not exist.
        describe(queue, 0, buffer, 64, 0xfff8 | way, 0xffff);
        break;
    case 18: // All of memory.
        describe(queue, 0, 0, (u32)memory_end, 0, 0);
        break;
    default: // Anything.
        for (u16 index = 0; index < 64 && index < size; index++)
            describe(queue, index, (void *)((u64)buffer + chance(1 << 21)), chance(1 << 16), chance(8), chance(size + 1));
        for (u16 index = 0; index < 32; index++)
            put(device, queue, chance(size));
    }
    put(device, queue, 0);
}

static void broken_rings(struct device *device)
{
    for (int kind = 0; kind < RINGS; kind++)
        for (u32 queue = 0; queue < device->queues; queue++) {
            if (start(device) != DRIVER_OK)
                fail(device, "rings");
            // Room for what the device has to say.
            for (u16 index = 0; index < 4 && queue != 0; index++) {
                describe(0, index, buffer + 0x10000, 4096, WRITE, 0);
                put(device, 0, index);
            }
            memset(buffer, 0, 4096);
            break_ring(device, queue, kind);
            kick(device, queue);
            // Most are answered at once or break the device; some are just ignored.
            for (int look = 0; look < 3 && !(get(device->base, STATUS) & NEEDS_RESET); look++)
                wait(20000);
            // What a driver does with a device that is broken.
            kick(device, queue);
            set(device->base, STATUS, get(device->base, STATUS) | 4);
        }
    // The used ring on top of the available ring, and all queues in one place.
    for (int overlap = 0; overlap < 2; overlap++) {
        negotiate(device->base);
        for (u32 queue = 0; queue < device->queues; queue++) {
            clear_queue(device, queue);
            u32 to = overlap ? 0 : queue;
            set_queue(device->base, queue, device->size[queue], (u64)rings[to].desc, (u64)&rings[to].avail,
                      (u64)&rings[to].avail);
            describe(queue, 0, buffer, 64, WRITE, 0);
            describe(queue, 1, buffer, 64, 0, 0);
        }
        set(device->base, STATUS, 15);
        for (u32 turn = 0; turn < 64; turn++) {
            put(device, turn % device->queues, turn & 1);
            kick(device, turn % device->queues);
        }
    }
    must_work(device, "rings");
}

// Requests that are almost right, for each kind of device.
static void fill(struct device *device)
{
    u32 queue = request_queue(device);
    u16 count = device->size[queue] < 16 ? device->size[queue] / 2 : 8;
    for (u16 index = 0; index < count; index++) {
        u8 *at = buffer + 4096 * index;
        u32 *words = (u32 *)at;
        switch (device->id) {
        case ID_RNG:
            describe(0, index, buffer, BUFFER_SIZE, WRITE, 0);
            break;
        case ID_BALLOON:
            // Pages outside, twice, at the edges; behind the program, so that it lives on.
            for (int word = 0; word < 1024; word++)
                words[word] = chance(4) ? (u32)(memory_end >> 12) - 1 - chance(64) : chance(0xffffffff) | 0x10000;
            describe(0, index, at, index & 1 ? 4096 : 4 * chance(2000), 0, 0);
            break;
        case ID_VSOCK:
            // The guest calls, sends, closes, as itself and as others.
            memset(at, 0, 64);
            words[0] = chance(8) ? 3 : chance(0xffffffff);
            words[2] = chance(8) ? 2 : chance(0xffffffff);
            words[4] = chance(64);
            words[5] = chance(4) ? chance(8) : chance(0xffffffff);
            words[6] = chance(4) ? 512 : chance(0xffffffff);
            words[7] = chance(8) << 16 | (chance(8) ? 1 : chance(0x10000));
            words[8] = chance(4);
            words[9] = chance(2) ? 0x40000 : chance(0xffffffff);
            words[10] = chance(0xffffffff);
            describe(1, index, at, 44 + 512, 0, 0);
            describe(0, index, buffer + 0x20000, 44 + 1024, WRITE, 0);
            put(device, 0, index);
            break;
        case ID_FS:
            // A header of FUSE and zeroes; FUSE_INIT first.
            memset(at, 0, 512);
            words[0] = 40 + 64;
            words[1] = index ? chance(56) : 26;
            words[2] = index;
            words[4] = chance(4);
            if (words[1] == 26) {
                words[10] = 7;
                words[11] = 41;
                words[13] = words[14] = 0xffffffff;
            }
            describe(1, 2 * index, at, words[0], NEXT, 2 * index + 1);
            describe(1, 2 * index + 1, buffer + 0x20000, 8192, WRITE, 0);
            break;
        default:
            describe(queue, index, at, chance(4096), chance(2) * WRITE, 0);
        }
        put(device, queue, device->id == ID_FS ? 2 * index : index);
    }
}

// One request of FUSE; its error, and the first number of the reply in `node`.
static int fuse(struct device *device, u32 opcode, u64 *node, const void *body, u32 length)
{
    u32 *header = (u32 *)buffer;
    int *reply = (int *)(buffer + 0x20000);
    memset(buffer, 0, 40);
    header[0] = 40 + length;
    header[1] = opcode;
    header[4] = (u32)*node;
    header[5] = (u32)(*node >> 32);
    memcpy(buffer + 40, body, length);
    memset(reply, 0, 64);
    describe(1, 0, buffer, 40 + length, NEXT, 1);
    describe(1, 1, reply, 8192, WRITE, 0);
    u16 before = device->next[1];
    put(device, 1, 0);
    kick(device, 1);
    if (!settle(device, 1, before + 1))
        return -1;
    if (reply[1] == 0)
        *node = *(u64 *)(reply + 4);
    return reply[1];
}

static u32 text(u8 *to, const char *from) { u32 length = 0; do to[length] = from[length]; while (from[length++]); return length; }

// Changes whatever can be reached in the share, by names good and bad.
static void change_files(struct device *device)
{
    static const char *const names[] = { "hostile", "..", "../hostile", "/hostile", "", "etc",
                                         "link", "rootfs", "file" };
    static u8 body[512];
    u64 nodes[8] = { 1 };
    u32 known = 1, count = sizeof names / sizeof *names;
    start(device);
    u32 init[16] = { 7, 41, 0x20000, ~0u, ~0u };
    u64 node = 0;
    if (fuse(device, 26, &node, init, sizeof init) != 0)
        return; // There is no share.
    for (u32 index = 0; index < known; index++)
        for (u32 name = 0; name < count; name++) {
            u32 length = text(body, names[name]);
            node = nodes[index];
            if (fuse(device, 1, &node, body, length) == 0 && known < 8)
                nodes[known++] = node;
        }
    tell("files found", known);
    for (u32 index = 0; index < known; index++) {
        for (u32 name = 0; name < count; name++) {
            // MKNOD of a file, a device, a FIFO; MKDIR, SYMLINK, LINK, CREATE, RENAME, SETXATTR, UNLINK, RMDIR.
            static const u32 modes[] = { 0100644, 0020666, 0060666, 0010666, 0140666 };
            for (u32 mode = 0; mode < 5; mode++) {
                memset(body, 0, 16);
                *(u32 *)body = modes[mode];
                ((u32 *)body)[1] = 0x501;
                node = nodes[index];
                fuse(device, 8, &node, body, 16 + text(body + 16, names[name]));
            }
            memset(body, 0, 16);
            *(u32 *)body = 0777;
            node = nodes[index];
            fuse(device, 9, &node, body, 8 + text(body + 8, names[name]));
            u32 length = text(body, names[name]);
            length += text(body + length, "/etc/passwd");
            node = nodes[index];
            fuse(device, 6, &node, body, length);
            for (u32 other = 0; other < known; other += 3) {
                *(u64 *)body = nodes[other];
                node = nodes[index];
                fuse(device, 13, &node, body, 8 + text(body + 8, names[name]));
                *(u64 *)body = nodes[other];
                length = 8 + text(body + 8, names[name]);
                length += text(body + length, "hostile");
                node = nodes[index];
                fuse(device, 12, &node, body, length);
            }
            memset(body, 0, 16);
            *(u32 *)body = 0102 | 01000; // O_RDWR, O_CREAT, O_TRUNC
            ((u32 *)body)[1] = 06777;
            node = nodes[index];
            fuse(device, 35, &node, body, 16 + text(body + 16, names[name]));
            for (u32 opcode = 10; opcode <= 11; opcode++) {
                node = nodes[index];
                fuse(device, opcode, &node, body, text(body, names[name]));
            }
        }
        // SETATTR of mode, size and owner, SETXATTR, OPEN to write and truncate, FALLOCATE without a handle.
        memset(body, 0, 88);
        *(u32 *)body = 0x1f;
        ((u32 *)body)[17] = 07777;
        node = nodes[index];
        fuse(device, 4, &node, body, 88);
        memset(body, 0, 16);
        *(u32 *)body = 1;
        u32 length = 16 + text(body + 16, "user.hostile");
        body[length++] = 'x';
        node = nodes[index];
        fuse(device, 21, &node, body, length);
        memset(body, 0, 8);
        *(u32 *)body = 02 | 01000;
        node = nodes[index];
        u64 handle = nodes[index];
        if (fuse(device, 14, &handle, body, 8) == 0) {
            memset(body, 0, 48);
            *(u64 *)body = handle;
            ((u32 *)body)[4] = 8;
            fuse(device, 16, &node, body, 48);
        }
    }
    must_work(device, "files");
}

static void reset_under_load(struct device *device)
{
    u32 loops = long_run ? 125 : 20;
    for (u32 loop = 0; loop < loops; loop++) {
        start(device);
        fill(device);
        for (u32 queue = 0; queue < device->queues; queue++)
            kick(device, queue);
        wait(chance(4) ? 0 : chance(20000));
        set(device->base, STATUS, 0);
    }
    must_work(device, "resets");
}

static void kick_storm(struct device *device)
{
    start(device);
    u32 count = long_run ? 2000 : 500;
    for (u32 turn = 0; turn < count; turn++)
        set(device->base, QUEUE_NOTIFY, turn % device->queues);
    // And of queues that there are not: each goes all the way to the monitor.
    for (u32 turn = 0; turn < count / 20; turn++)
        set(device->base, QUEUE_NOTIFY, device->queues + turn);
    // With something in the queues all the time.
    for (u32 turn = 0; turn < count / 20; turn++) {
        if (turn % 16 == 0)
            fill(device);
        set(device->base, QUEUE_NOTIFY, turn % device->queues);
        if (get(device->base, STATUS) & NEEDS_RESET)
            start(device);
    }
    must_work(device, "kicks");
}

static void console_and_interrupts(void)
{
    for (u32 turn = 0; turn < (long_run ? 5000u : 1000u); turn++)
        out8(UART, turn % 61 ? chance(256) : '\n');
    for (u32 port = UART; port < UART + 8; port++) {
        (void)in8(port);
        if (port != UART + 3)
            out8(port, chance(256));
    }
    // Routes of all kinds, each of which the monitor takes to KVM; masked in the end.
    for (u32 turn = 0; turn < (long_run ? 500u : 100u); turn++) {
        set(IOAPIC, 0, chance(256));
        set(IOAPIC, 0x10, chance(0xffffffff) | 0x10000 * chance(2));
        (void)get(IOAPIC, 0x10);
        *(volatile u8 *)(u64)(IOAPIC + chance(0x1000)) = chance(256);
    }
    for (u32 pin = 0; pin < 120; pin++) {
        set(IOAPIC, 0, 0x10 + 2 * pin);
        set(IOAPIC, 0x10, 0x10000);
    }
    say("\n");
}

// ---- The second processor ----

static volatile u32 racing, resting, second_is_up;

void second(void);

// Changes descriptors, indexes and buffers under the devices.
void second(void)
{
    second_is_up = 1;
    u64 state = 88172645463325252ull;
    for (;;) {
        if (!racing) {
            resting = 1;
            relax();
            continue;
        }
        resting = 0;
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        u32 queue = state >> 8 & 1;
        u32 index = state >> 16 & 7;
        volatile struct desc *desc = &rings[queue].desc[index];
        switch (state >> 32 & 7) {
        case 0: desc->len = state >> 40; break;
        case 1: desc->flags = state >> 40 & 7; break;
        case 2: desc->next = state >> 40 & 15; break;
        case 3: desc->addr = (u64)buffer + (state >> 40 & 0xfffff); break;
        case 4: rings[queue].avail.idx = rings[queue].avail.idx + 1; break;
        case 5: *(volatile u32 *)(buffer + 4096 * index + (state >> 40 & 60)) = state >> 36; break;
        case 6: desc->addr = state; break;
        default: table[index].next = state >> 40;
        }
    }
}

static int start_second(void)
{
    memcpy((void *)(u64)TRAMPOLINE, trampoline, trampoline_end - trampoline);
    // INIT, then start-up, to all but this one (Intel SDM volume 3A, 11.6.1).
    set(LAPIC, 0xf0, 0x1ff);
    set(LAPIC, 0x300, 0xc4500);
    for (u64 begin = tsc(); tsc() - begin < 10000000; relax())
        ;
    set(LAPIC, 0x300, 0xc4600 | TRAMPOLINE >> 12);
    for (u64 begin = tsc(); tsc() - begin < 4000000000ull; relax())
        if (second_is_up)
            return 1;
    return 0;
}

static void race(struct device *device)
{
    if (!second_is_up)
        return;
    for (u32 turn = 0; turn < (long_run ? 50u : 10u); turn++) {
        start(device);
        fill(device);
        racing = 1;
        for (u32 kicks = 0; kicks < 20; kicks++)
            kick(device, kicks % device->queues);
        if (turn % 2)
            set(device->base, STATUS, 0);
        racing = 0;
        for (resting = 0; !resting; relax())
            ;
    }
    must_work(device, "races");
}

// ---- All of it ----

static void find_memory(void)
{
    // hvm_start_info: the memory map's address at 40, its length at 48; entries of 24 bytes.
    u8 *info = (u8 *)(u64)start_info;
    u64 *map = *(u64 **)(info + 40);
    for (u32 entry = 0; entry < *(u32 *)(info + 48); entry++)
        if (map[3 * entry] < 0xc0000000ull)
            memory_end = map[3 * entry] + map[3 * entry + 1];
    for (const char *line = *(const char **)(info + 24); *line; line++) {
        const char *word = "hostile=long", *at = line;
        while (*word && *at == *word)
            at++, word++;
        if (!*word)
            long_run = 1;
    }
}

static void attack(struct device *device)
{
    tell("device", device->id);
    registers(device);
    addresses(device);
    broken_rings(device);
    reset_under_load(device);
    kick_storm(device);
    race(device);
    if (device->id == ID_FS)
        change_files(device);
}

void main(void);

void main(void)
{
    static struct device devices[SLOT_COUNT];
    find_memory();
    tell("hostile guest, memory", memory_end);
    tell("processors", 1 + start_second());
    u32 count = 0;
    for (u32 slot = 0; slot < SLOT_COUNT; slot++) {
        u32 base = SLOTS + 0x1000 * slot;
        if (get(base, 0) != 0x74726976 || get(base, DEVICE_ID) == 0)
            continue;
        struct device *device = &devices[count++];
        *device = (struct device){ .base = base, .id = get(base, DEVICE_ID) };
        for (u32 queue = 0; queue < QUEUES; queue++) {
            set(base, QUEUE_SELECT, queue);
            u32 size = get(base, QUEUE_SIZE_MAX);
            if (size == 0)
                break;
            device->size[queue] = size < 1024 ? size : 1024;
            device->queues++;
        }
    }
    tell("devices", count);
    for (u32 round = 1; round <= (long_run ? 2u : 1u); round++) {
        for (u32 device = 0; device < count; device++)
            attack(&devices[device]);
        console_and_interrupts();
        tell("round", round);
    }
    // All devices at once, and the end in the middle of it.
    for (u32 device = 0; device < count; device++) {
        start(&devices[device]);
        fill(&devices[device]);
        kick(&devices[device], request_queue(&devices[device]));
    }
    tell("survived, failures", failures);
    out8(RESET_PORT, 0xfe);
    for (;;)
        relax();
}
