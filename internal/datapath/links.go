package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// linkOn says where a pinned link is: attached to the device of that index in this
// network namespace, to one in another namespace, or nowhere.
type linkOn int

const (
	linkNowhere linkOn = iota
	linkHere
	linkElsewhere
)

// locate asks the device and not the link alone: the same index is another device
// in another network namespace, and the kernel reuses indexes.
func locate(l link.Link, dir direction, index int) linkOn {
	info, err := l.Info()
	if err != nil || info.TCX() == nil || int(info.TCX().Ifindex) != index {
		return linkNowhere
	}
	res, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: dir.tcx()})
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return linkHere // what the link says is all there is
	}
	if err != nil {
		return linkElsewhere
	}
	for _, p := range res.Programs {
		if id, ok := p.LinkID(); ok && id == info.ID {
			return linkHere
		}
	}
	return linkElsewhere
}

func (a *attachment) linked(dir direction) bool {
	return a.links[dir] != nil && locate(a.links[dir], dir, a.index) == linkHere
}

func (d *Datapath) attachLink(a *attachment, dir direction, prog *ebpf.Program) error {
	if a.linked(dir) {
		return nil
	}
	if a.links[dir] != nil {
		a.links[dir].Close()
		a.links[dir] = nil
	}
	// First of the chain: a program ahead of us could end it.
	l, err := link.AttachTCX(link.TCXOptions{Interface: a.index, Program: prog, Attach: dir.tcx(), Anchor: link.Head()})
	if err != nil {
		return err
	}
	if err := replacePin(l.Pin, filepath.Join(d.opt.Root, pinLink(dir, a.index))); err != nil {
		l.Close()
		return err
	}
	a.links[dir] = l
	return nil
}

// dropLinks detaches the links of a, the egress program first to leave as it came.
// The kernel would do it when the last reference is gone, but some time later.
func (d *Datapath) dropLinks(a *attachment) {
	for _, dir := range [...]direction{egress, ingress} {
		if a.links[dir] != nil {
			if err := a.links[dir].Detach(); err != nil {
				d.opt.Log.Debug("detach", "device", a.name, "direction", dir.String(), "error", err) // the device is gone
			}
			a.links[dir].Close()
			a.links[dir] = nil
		}
		os.Remove(filepath.Join(d.opt.Root, pinLink(dir, a.index)))
	}
}

// takeOver finds the attachments that an earlier agent left and gives them this
// version's programs: by a link update or by replacing the filter in place, so
// that no packet passes unseen. Half an attachment, of a crash, becomes a whole one.
func (d *Datapath) takeOver() error {
	d.taken = true
	if err := d.findLinks(); err != nil {
		return err
	}
	devices, err := listDevices()
	if err != nil {
		return err
	}
	now, err := monotonicSeconds()
	if err != nil {
		return err
	}
	for _, dev := range devices {
		index := dev.Attrs().Index
		a := d.attached[index]
		filters, err := leftFilters(index)
		if err != nil {
			return err
		}
		if a == nil && !filters {
			continue
		}
		if a == nil {
			a = &attachment{index: index}
			d.attached[index] = a
		}
		a.name, a.ethernet, a.filters = dev.Attrs().Name, isEthernet(dev), filters
		var value masqDevice
		if d.objs.Devices.Lookup(uint32(index), &value) != nil {
			a.draining, a.since = true, now
		}
		if err := d.replacePrograms(a); err != nil {
			return err
		}
	}
	return d.removeMarks()
}

// removeMarks forgets qdiscs that are no longer ours: their device is gone.
func (d *Datapath) removeMarks() error {
	names, err := pinNames(d.opt.Root)
	for _, name := range names {
		number, ok := strings.CutPrefix(name, markPrefix)
		index, _ := strconv.Atoi(number)
		if a := d.attached[index]; ok && (a == nil || !a.filters) {
			removeMark(d.opt.Root, index)
		}
	}
	return err
}

func (d *Datapath) replacePrograms(a *attachment) error {
	for _, dir := range directions {
		if a.links[dir] == nil {
			continue
		}
		prog, err := d.program(dir, a.ethernet)
		if err == nil {
			err = a.links[dir].Update(prog)
		}
		if err != nil {
			return fmt.Errorf("replace the %s program of %s: %w", dir, a.name, err)
		}
	}
	return d.attachPrograms(a)
}

// findLinks opens the pinned links that are still on a device.
func (d *Datapath) findLinks() error {
	names, err := pinNames(d.opt.Root)
	if err != nil {
		return err
	}
	for _, name := range names {
		dir, index, ok := parsePinLink(name)
		if !ok {
			continue
		}
		path := filepath.Join(d.opt.Root, name)
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return fmt.Errorf("open pinned link %s: %w", name, err)
		}
		switch locate(l, dir, index) {
		case linkHere:
			if d.attached[index] == nil {
				d.attached[index] = &attachment{index: index}
			}
			d.attached[index].links[dir] = l
			continue
		case linkElsewhere:
			l.Close()
			return hint(fmt.Errorf("bpf-root %s: its programs are attached in another network namespace", d.opt.Root),
				"give the agent of each network namespace a --bpf-root and --run-dir of its own")
		}
		// The device is gone, and the kernel has detached the link.
		l.Close()
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove pin of a vanished device: %w", err)
		}
		if err := d.deleteVanished(index); err != nil {
			return err
		}
	}
	return nil
}

func (d *Datapath) deleteVanished(index int) error {
	var notFound netlink.LinkNotFoundError
	if _, err := netlink.LinkByIndex(index); errors.As(err, &notFound) {
		return d.deleteDevice(index)
	}
	return nil
}

func isEthernet(l netlink.Link) bool {
	return l.Attrs().EncapType == "ether" || l.Attrs().EncapType == "loopback"
}

// dumpTries is how often a list is asked for that changed while it was read.
const dumpTries = 10

func dump[T any](list func() ([]T, error)) (all []T, err error) {
	for range dumpTries {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

func listDevices() ([]netlink.Link, error) {
	devices, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list devices: %w", err)
	}
	return devices, nil
}
