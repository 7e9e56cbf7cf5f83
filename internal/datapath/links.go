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

	"bauta.dev/bauta/internal/advice"
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
	if a.displaced(dir) {
		if err := d.moveLink(a, dir); err != nil {
			return err
		}
	}
	if a.linked(dir) {
		return nil
	}
	a.current[dir] = false
	if a.links[dir] != nil {
		a.links[dir].Close()
		a.links[dir] = nil
	}
	anchor := link.Head() // a program ahead of us could end the chain
	if dir == sentinel {
		anchor = link.Tail()
	}
	l, err := link.AttachTCX(link.TCXOptions{Interface: a.index, Program: prog, Attach: dir.tcx(), Anchor: anchor})
	if err != nil {
		return err
	}
	if err := replacePin(l.Pin, filepath.Join(d.opt.Root, pinLink(dir, a.index))); err != nil {
		l.Close()
		return err
	}
	a.links[dir], a.current[dir] = l, true
	return nil
}

// dropLinks detaches the links of a, the last one first to leave as it came.
func (d *Datapath) dropLinks(a *attachment) {
	for _, dir := range backwards {
		d.dropLink(a, dir)
	}
}

// dropLink detaches a link. The kernel would do it when the last reference is gone,
// but some time later.
func (d *Datapath) dropLink(a *attachment, dir direction) {
	if a.links[dir] != nil {
		if err := a.links[dir].Detach(); err != nil {
			d.opt.Log.Debug("detach", "device", a.name, "direction", dir.String(), "error", err) // the device is gone
		}
		a.links[dir].Close()
		a.links[dir] = nil
	}
	os.Remove(filepath.Join(d.opt.Root, pinLink(dir, a.index)))
}

// takeOver finds the attachments that an earlier agent left and gives them this
// version's programs: by a link update or by replacing the filter in place, so
// that no packet passes unseen. Half an attachment, of a crash, becomes a whole one.
// A device that fails keeps the programs it has, and Apply tries again.
func (d *Datapath) takeOver() error {
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
	var list []*attachment
	for _, dev := range devices {
		index := dev.Attrs().Index
		a := d.attached[index]
		filters, err := leftFilters(index)
		if err != nil {
			d.opt.Log.Warn("device not searched for programs of ours", "device", dev.Attrs().Name, "error", err)
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
		list = append(list, a)
	}
	if d.old != nil {
		if err := d.migrate(list); err != nil {
			return err
		}
	}
	if err := d.attach(list); err != nil {
		d.opt.Log.Warn("attachments of an earlier agent not complete", "error", err)
	}
	d.taken = true
	d.armReclaim()
	return d.removeMarks()
}

// removeMarks forgets qdiscs that are no longer ours: they or their devices are gone.
func (d *Datapath) removeMarks() error {
	names, err := pinNames(d.opt.Root)
	for _, name := range names {
		number, ok := strings.CutPrefix(name, markPrefix)
		if !ok {
			continue
		}
		index, _ := strconv.Atoi(number)
		if kind, err := filterQdisc(index); err == nil && kind != kindClsact {
			removeMark(d.opt.Root, index)
		}
	}
	return err
}

// pinnedLink is a link that an earlier agent pinned.
type pinnedLink struct {
	link.Link
	name  string
	dir   direction
	index int
}

// findLinks opens the pinned links that are still on a device. Links move with
// their device to another network namespace, and are detached there; if all of
// them are in another one, so is the agent that root belongs to.
func (d *Datapath) findLinks() error {
	names, err := pinNames(d.opt.Root)
	if err != nil {
		return err
	}
	var moved []pinnedLink
	for _, name := range names {
		dir, index, ok := parsePinLink(name)
		if !ok {
			continue
		}
		l, err := link.LoadPinnedLink(filepath.Join(d.opt.Root, name), nil)
		if err != nil {
			d.opt.Log.Warn("pinned link not opened", "pin", name, "error", err)
			continue
		}
		p := pinnedLink{l, name, dir, index}
		switch locate(l, dir, index) {
		case linkHere:
			if d.attached[index] == nil {
				d.attached[index] = &attachment{index: index}
			}
			if a := d.attached[index]; a.links[dir] == nil {
				a.links[dir] = l
			} else {
				l.Close()
			}
		case linkElsewhere:
			moved = append(moved, p)
		default:
			d.dropPinned(p) // the device is gone, and the kernel has detached the link
		}
	}
	if len(d.attached) == 0 && len(moved) > 0 {
		for _, p := range moved {
			p.Close()
		}
		return advice.New(fmt.Errorf("bpf-root %s: its programs are attached in another network namespace", d.opt.Root),
			"give the agent of each network namespace a --bpf-root and --run-dir of its own")
	}
	for _, p := range moved {
		d.opt.Log.Warn("device moved to another network namespace, detached from it", "pin", p.name)
		if err := p.Detach(); err != nil {
			d.opt.Log.Debug("detach", "pin", p.name, "error", err) // the device is gone
		}
		d.dropPinned(p)
	}
	return nil
}

// dropPinned forgets a link that is not on a device of this network namespace.
func (d *Datapath) dropPinned(p pinnedLink) {
	p.Close()
	err := os.Remove(filepath.Join(d.opt.Root, p.name))
	if err = errors.Join(err, d.deleteVanished(p.index)); err != nil {
		d.opt.Log.Warn("pin or entry of a vanished device remains", "pin", p.name, "error", err)
	}
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
