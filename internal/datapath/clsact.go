package datapath

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Classic attachment, for kernels without tcx: a clsact qdisc, shared with
// everybody, and one filter of ours in each direction. Nothing that is not ours
// is ever deleted or replaced; the qdisc stays when others have filters in it.

const (
	filterHandle = 0xba07
	// Priorities tried for a filter; programs behind us still run, ours end no chain.
	firstPriority, lastPriority = 1, 16
)

func filterName(dir direction) string { return "bauta_" + dir.String() }

func filterParent(dir direction) uint32 {
	return [...]uint32{netlink.HANDLE_MIN_EGRESS, netlink.HANDLE_MIN_INGRESS}[dir]
}

func clsact(index int) netlink.Qdisc {
	return &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
}

// attachTC adds our filter, or gives the one that is there another program.
func attachTC(root string, index int, dir direction, prog *ebpf.Program) error {
	switch err := netlink.QdiscAdd(clsact(index)); {
	case err == nil:
		if err := os.Mkdir(markQdisc(root, index), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("remember the qdisc: %w", err)
		}
	case !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("add clsact: %w", err)
	}
	own, err := ownFilters(index, dir)
	if err != nil {
		return err
	}
	filter := &netlink.BpfFilter{
		FilterAttrs:  netlink.FilterAttrs{LinkIndex: index, Parent: filterParent(dir), Handle: filterHandle, Protocol: unix.ETH_P_ALL},
		Fd:           prog.FD(),
		Name:         filterName(dir),
		DirectAction: true,
	}
	if len(own) > 0 {
		filter.Priority, filter.Handle = own[0].Attrs().Priority, own[0].Attrs().Handle
		if err := netlink.FilterReplace(filter); err != nil {
			return fmt.Errorf("replace filter: %w", err)
		}
		return nil
	}
	return addFilter(filter)
}

// addFilter adds a filter as far ahead as it can be without touching another one.
func addFilter(f *netlink.BpfFilter) (err error) {
	for f.Priority = firstPriority; f.Priority <= lastPriority; f.Priority++ {
		err = netlink.FilterAdd(f)
		// EEXIST: the handle is another's; EINVAL: the priority is one of another kind or protocol.
		if !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("add filter: %w", err)
	}
	return nil
}

func listFilters(index int, dir direction) ([]netlink.Filter, error) {
	device := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}}
	all, err := dump(func() ([]netlink.Filter, error) { return netlink.FilterList(device, filterParent(dir)) })
	if err != nil {
		return nil, fmt.Errorf("list filters: %w", err)
	}
	return all, nil
}

func isOwnFilter(f netlink.Filter, dir direction) bool {
	b, ok := f.(*netlink.BpfFilter)
	return ok && b.Name == filterName(dir)
}

// ownFilters returns our filters of one direction.
func ownFilters(index int, dir direction) ([]netlink.Filter, error) {
	all, err := listFilters(index, dir)
	var own []netlink.Filter
	for _, f := range all {
		if isOwnFilter(f, dir) {
			own = append(own, f)
		}
	}
	return own, err
}

func hasFilter(index int, dir direction) bool {
	own, err := ownFilters(index, dir)
	return err == nil && len(own) > 0
}

// detachTC removes our filters, and the qdisc if we made it and nobody else has a
// filter in it by now.
func detachTC(root string, index int) error {
	for _, dir := range [...]direction{egress, ingress} {
		own, err := ownFilters(index, dir)
		if err != nil {
			return err
		}
		for _, f := range own {
			if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("delete filter: %w", err)
			}
		}
	}
	if _, err := os.Stat(markQdisc(root, index)); err != nil {
		return nil
	}
	for _, dir := range directions {
		if foreign, err := listFilters(index, dir); err != nil || len(foreign) > 0 {
			return err // the qdisc is theirs from now on
		}
	}
	if err := netlink.QdiscDel(clsact(index)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("delete clsact: %w", err)
	}
	removeMark(root, index)
	return nil
}

// removeMark forgets that a qdisc is ours; a mark that stays is no harm.
func removeMark(root string, index int) { os.Remove(markQdisc(root, index)) }
