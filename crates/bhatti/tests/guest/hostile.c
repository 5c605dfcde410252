// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * A guest's kernel against its VMM: gives every virtio-mmio device of the guest, or those of one kind, what no driver would.
 *
 *   insmod hostile.ko seed=1 rounds=5000 device=2
 *
 * It sets queues up over pages of its own, fills them with descriptors that are random (loops, lengths up to 4 GiB, addresses within these
 * pages, in the devices' own registers, beyond all memory), notifies, resets, and writes and reads random registers. The same seed does
 * the same. The guest does not survive it as a rule. Registers are those of the virtio 1.2 specification, 4.2.2.
 */
#include <linux/delay.h>
#include <linux/io.h>
#include <linux/module.h>
#include <linux/mm.h>
#include <linux/platform_device.h>
#include <linux/sched.h>

static unsigned long seed = 1;
module_param(seed, ulong, 0);
static unsigned int rounds = 5000;
module_param(rounds, uint, 0);
/* The kind of device, as the specification numbers them (1 network, 2 block, 3 console, 19 socket); all if 0. */
static unsigned int device;
module_param(device, uint, 0);

#define DEVICES_MAX 32
#define RING_ORDER 3
#define RING_BYTES (PAGE_SIZE << RING_ORDER)
#define REGISTERS_BYTES 0x200

struct target {
	void __iomem *registers;
	u64 address;
};

static struct target targets[DEVICES_MAX];
static unsigned int found;
static u8 *ring;
static u64 ring_address;
static u64 state;

/* xorshift64 */
static u64 next(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static int find(struct device *dev, void *unused)
{
	struct platform_device *platform = to_platform_device(dev);
	struct resource *memory;
	void __iomem *registers;

	if (!dev->driver || strcmp(dev->driver->name, "virtio-mmio") || found == DEVICES_MAX)
		return 0;
	memory = platform_get_resource(platform, IORESOURCE_MEM, 0);
	if (!memory)
		return 0;
	registers = ioremap(memory->start, REGISTERS_BYTES);
	if (!registers)
		return 0;
	if (!readl(registers + 0x008) || (device && readl(registers + 0x008) != device)) {
		iounmap(registers);
		return 0;
	}
	targets[found].registers = registers;
	targets[found++].address = memory->start;
	return 0;
}

static u64 address(struct target *target)
{
	switch (next() % 8) {
	case 0:
		return next();
	case 1:
		return target->address + next() % REGISTERS_BYTES;
	case 2:
		return ~0ULL - next() % 65536;
	default:
		return ring_address + next() % RING_BYTES;
	}
}

static u32 length(void)
{
	static const u32 odd[] = { 0, 1, 4095, 65536, 0x7fffffff, 0x80000000, 0xffffffff };

	return next() % 2 ? (u32)(next() % 8192) : odd[next() % ARRAY_SIZE(odd)];
}

/* Descriptors in the first page, the available ring in the second, the used ring in the third. */
static void fill(struct target *target)
{
	unsigned int index;

	for (index = 0; index < 256; index++) {
		u8 *descriptor = ring + index * 16;

		*(u64 *)descriptor = address(target);
		*(u32 *)(descriptor + 8) = length();
		*(u16 *)(descriptor + 12) = next() % 8;
		*(u16 *)(descriptor + 14) = next() % 4 ? next() % 256 : next();
	}
	for (index = 0; index < 256; index++)
		((u16 *)(ring + PAGE_SIZE))[2 + index] = next() % 8 ? next() % 256 : next();
	/* Where indirect tables and requests begin. */
	for (index = 4 * PAGE_SIZE / 8; index < RING_BYTES / 8; index++)
		((u64 *)ring)[index] = next() % 3 ? next() % 64 : address(target);
	((u16 *)(ring + PAGE_SIZE))[1] += next() % 8 ? next() % 16 : next();
}

static void set_address(void __iomem *registers, u32 offset, u64 value)
{
	writel((u32)value, registers + offset);
	writel((u32)(value >> 32), registers + offset + 4);
}

static void set_queue(struct target *target, u32 queue, bool sound)
{
	void __iomem *registers = target->registers;

	writel(queue, registers + 0x030);
	writel(sound ? 256 : length(), registers + 0x038);
	set_address(registers, 0x080, sound ? ring_address : address(target));
	set_address(registers, 0x090, sound ? ring_address + PAGE_SIZE : address(target));
	set_address(registers, 0x0a0, sound ? ring_address + 2 * PAGE_SIZE : address(target));
	writel(1, registers + 0x044);
}

/* Begins as a driver does, so that what follows is not refused at the door. */
static void start(struct target *target)
{
	void __iomem *registers = target->registers;
	u32 queue;

	writel(0, registers + 0x070);
	memset(ring, 0, RING_BYTES);
	writel(3, registers + 0x070);
	writel(0, registers + 0x024);
	writel(next() % 2 ? 0 : (u32)next(), registers + 0x020);
	writel(1, registers + 0x024);
	writel(1, registers + 0x020);
	writel(11, registers + 0x070);
	for (queue = 0; queue < 4; queue++)
		set_queue(target, queue, next() % 8 != 0);
	writel(15, registers + 0x070);
}

static void act(struct target *target)
{
	void __iomem *registers = target->registers;

	switch (next() % 16) {
	case 0:
		start(target);
		break;
	case 1:
		set_queue(target, next() % 70, next() % 2);
		break;
	case 2:
		writel((u32)next(), registers + (next() % (REGISTERS_BYTES / 4)) * 4);
		break;
	case 3:
		writeb((u8)next(), registers + next() % REGISTERS_BYTES);
		break;
	case 4:
		readl(registers + (next() % (REGISTERS_BYTES / 4)) * 4);
		break;
	case 5:
		writel(next() % 64, registers + 0x064);
		break;
	default:
		fill(target);
		writel(next() % 8 ? next() % 4 : (u32)next(), registers + 0x050);
	}
}

static int __init begin(void)
{
	unsigned int index, done;

	state = seed * 0x9e3779b97f4a7c15ULL + 1;
	ring = (u8 *)__get_free_pages(GFP_KERNEL | __GFP_ZERO, RING_ORDER);
	if (!ring)
		return -ENOMEM;
	ring_address = virt_to_phys(ring);
	bus_for_each_dev(&platform_bus_type, NULL, NULL, find);
	pr_emerg("hostile: %u devices, seed %lu, %u rounds\n", found, seed, rounds);
	if (!found)
		return -ENODEV;
	for (index = 0; index < found; index++)
		start(&targets[index]);
	for (done = 0; done < rounds; done++) {
		act(&targets[next() % found]);
		if (done % 256 == 0)
			cond_resched();
	}
	pr_emerg("hostile: done\n");
	return 0;
}

module_init(begin);
MODULE_LICENSE("Dual MIT/GPL");
MODULE_DESCRIPTION("Gives virtio devices what no driver would");
