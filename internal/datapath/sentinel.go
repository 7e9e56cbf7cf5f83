package datapath

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
)

// The leak sentinel is a program behind all others: see bpf/sentinel.h. It has a
// link or filter like the other two, but no part in whether a device is attached.

// sentinelPrograms are loaded only where they are wanted.
type sentinelPrograms struct {
	Ether *ebpf.Program `ebpf:"sentinel_ether"`
	Raw   *ebpf.Program `ebpf:"sentinel_raw"`
}

func (p *sentinelPrograms) Close() error { return _MasqClose(p.Ether, p.Raw) }

func (p *sentinelPrograms) of(ethernet bool) *ebpf.Program {
	if ethernet {
		return p.Ether
	}
	return p.Raw
}

// attachSentinel puts the sentinel behind everything else on a device, or takes it
// away.
func (d *Datapath) attachSentinel(a *attachment) error {
	if d.opt.Sentinel {
		if err := d.attachProgram(a, sentinel); err != nil {
			return fmt.Errorf("attach the leak sentinel to %s: %w", a.name, err)
		}
		return nil
	}
	d.dropLink(a, sentinel)
	if a.filters {
		if err := deleteFilter(a.index, sentinel); err != nil {
			return fmt.Errorf("detach the leak sentinel from %s: %w", a.name, err)
		}
	}
	return nil
}

// watched tells whether the sentinel is on a device.
func (a *attachment) watched() bool {
	return a.linked(sentinel) || a.filters && hasFilter(a.index, sentinel)
}

// clearLeaks forgets what a sentinel saw that is no longer wanted.
func (d *Datapath) clearLeaks() error {
	var sample masqLeak
	var device uint32
	for {
		err := d.objs.Leaks.NextKey(nil, &sample)
		if err == nil {
			err = d.objs.Leaks.Delete(sample)
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			break
		}
		if err != nil {
			return fmt.Errorf("clear leaks: %w", err)
		}
	}
	for {
		err := d.objs.Leaked.NextKey(nil, &device)
		if err == nil {
			err = d.objs.Leaked.Delete(device)
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("clear leaks: %w", err)
		}
	}
}

// Leak is a sample of packets that left a device with a source that should have
// been masqueraded.
type Leak struct {
	Index       int           // of the device
	Source      netip.Addr    // zero in the sum of a device
	Destination netip.Addr    // zero in the sum of a device
	Proto       uint8         // IP protocol number
	Packets     uint64        // with GSO, of the wire
	First, Last time.Duration // ago
}

// Leaks returns the sums by device, and samples: the newest ones, the last first.
func (i *Inspector) Leaks() (devices, samples []Leak, err error) {
	now, err := monotonicSeconds()
	if err != nil {
		return nil, nil, err
	}
	sums, err := i.openLeaks(pinLeaked)
	if err != nil || sums == nil {
		return nil, nil, err
	}
	defer sums.Close()
	var index uint32
	var perCPU []masqLeakCount
	it := sums.Iterate()
	for it.Next(&index, &perCPU) {
		var sum masqLeakCount
		for _, c := range perCPU {
			if c.Packets == 0 {
				continue
			}
			if sum.Packets == 0 || int32(c.First-sum.First) < 0 {
				sum.First = c.First
			}
			if sum.Packets == 0 || int32(c.Last-sum.Last) > 0 {
				sum.Last = c.Last
			}
			sum.Packets += c.Packets
		}
		devices = append(devices, Leak{Index: int(index), Packets: sum.Packets, First: age(now, sum.First), Last: age(now, sum.Last)})
	}
	if err := it.Err(); err != nil {
		return nil, nil, fmt.Errorf("read leaks: %w", err)
	}
	m, err := i.openLeaks(pinLeaks)
	if err != nil || m == nil {
		return nil, nil, err
	}
	defer m.Close()
	var key masqLeak
	var count masqLeakCount
	it = m.Iterate()
	for it.Next(&key, &count) {
		samples = append(samples, Leak{Index: int(key.Device), Source: addrFrom(key.Src), Destination: addrFrom(key.Dst), Proto: key.Proto,
			Packets: count.Packets, First: age(now, count.First), Last: age(now, count.Last)})
	}
	// Samples come and go while they are read.
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return nil, nil, fmt.Errorf("read leaks: %w", err)
	}
	slices.SortFunc(devices, func(a, b Leak) int { return a.Index - b.Index })
	slices.SortFunc(samples, func(a, b Leak) int {
		return cmp.Or(cmp.Compare(a.Last, b.Last), a.Source.Compare(b.Source), a.Destination.Compare(b.Destination), cmp.Compare(a.Proto, b.Proto), a.Index-b.Index)
	})
	return devices, samples, nil
}

// openLeaks opens a table of the sentinel; nil: an earlier version made the others.
func (i *Inspector) openLeaks(name string) (*ebpf.Map, error) {
	m, err := ebpf.LoadPinnedMap(filepath.Join(i.root, name), nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open pinned table %s: %w", name, err)
	}
	return m, nil
}
