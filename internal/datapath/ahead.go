package datapath

import (
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
)

// A program ahead of ours may end the chain, and packets leave unseen. So the egress
// program takes its place at the head again when others have come ahead. It does
// so a few times for a device and not for ever: who else wants to be first may
// do the same, and status names the programs that are ahead.

// maxMoves is how often the egress program of a device is put ahead again.
const maxMoves = 3

// position returns how many programs run before and behind ours in its tcx chain.
func position(l link.Link, dir direction, index int) (ahead, behind int, err error) {
	info, err := l.Info()
	if err != nil {
		return 0, 0, err
	}
	res, err := link.QueryPrograms(link.QueryOptions{Target: index, Attach: dir.tcx()})
	if err != nil {
		return 0, 0, err
	}
	for i, p := range res.Programs {
		if id, ok := p.LinkID(); ok && id == info.ID {
			return i, len(res.Programs) - i - 1, nil
		}
	}
	return 0, 0, fmt.Errorf("%s program is not on the device", dir)
}

// displaced tells whether a program is in a place from which it can be moved to
// a better one.
func (a *attachment) displaced(dir direction) bool {
	if a.links[dir] == nil {
		return dir == egress && a.filters && a.moves < maxMoves && foreignAhead(a.index)
	}
	ahead, behind, err := position(a.links[dir], dir, a.index)
	switch {
	case err != nil:
		return false
	case dir == egress:
		return ahead > 0 && a.moves < maxMoves
	case dir == sentinel:
		return behind > 0
	}
	return false
}

// moveLink gives a program the place in the chain that it should have.
func (d *Datapath) moveLink(a *attachment, dir direction) error {
	if dir == sentinel {
		d.dropLink(a, sentinel) // nothing depends on it
		return nil
	}
	a.moves++
	// The kernel takes a program only once in a chain, and without ours packets would
	// leave untranslated: so it is a copy that comes first, and then the old one goes.
	prog, err := d.copyEgress(a.ethernet)
	if err != nil {
		return err
	}
	defer prog.Close()
	l, err := link.AttachTCX(link.TCXOptions{Interface: a.index, Program: prog, Attach: dir.tcx(), Anchor: link.Head()})
	if err != nil {
		return err
	}
	if err := replacePin(l.Pin, filepath.Join(d.opt.Root, pinLink(dir, a.index))); err != nil {
		l.Close()
		return err
	}
	old := a.links[dir]
	a.links[dir], a.current[dir] = l, true
	d.opt.Log.Warn("another program was ahead of the egress program, put ahead again", "device", a.name)
	if err := old.Detach(); err != nil {
		d.opt.Log.Debug("detach", "device", a.name, "direction", dir.String(), "error", err) // the device is gone
	}
	return old.Close()
}

// copyEgress loads the egress program once more.
func (d *Datapath) copyEgress(ethernet bool) (*ebpf.Program, error) {
	if ethernet {
		var p struct {
			Program *ebpf.Program `ebpf:"egress_ether"`
		}
		err := d.loadMore(&p)
		return p.Program, err
	}
	var p struct {
		Program *ebpf.Program `ebpf:"egress_raw"`
	}
	err := d.loadMore(&p)
	return p.Program, err
}

// foreignAhead tells whether filters of others run before ours.
func foreignAhead(index int) bool {
	filters, err := listFilters(index, egress)
	return err == nil && len(filters) > 0 && !isOwnFilter(filters[0], egress) && hasFilter(index, egress)
}

// moveFilter adds the egress filter once more, as far ahead as it goes, and deletes
// the one of the two that is behind. Of one priority the newest filter is the first.
func (d *Datapath) moveFilter(a *attachment, prog *ebpf.Program) error {
	a.moves++
	own, err := ownFilters(a.index, egress)
	if err != nil || len(own) == 0 {
		return err
	}
	next := newFilter(a.index, egress, prog)
	if own[0].Attrs().Handle == next.Handle {
		next.Handle++
	}
	if err := addFilter(next); err != nil {
		return err
	}
	if own, err = ownFilters(a.index, egress); err != nil || len(own) < 2 {
		return err
	}
	for _, behind := range own[1:] {
		if err := netlink.FilterDel(behind); err != nil {
			return fmt.Errorf("delete filter: %w", err)
		}
	}
	if !foreignAhead(a.index) {
		d.opt.Log.Warn("another filter was ahead of the egress program, put ahead again", "device", a.name)
	}
	return nil
}
