package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Classic attachment, for kernels without tcx: a clsact qdisc, shared with
// everybody, and one filter of ours in each direction. Nothing that is not ours
// is ever deleted; the qdisc stays when others have filters in it.

const (
	filterHandle   = 0xba07
	filterPriority = 1 // first; programs behind us still run, ours end no chain
)

func filterName(dir direction) string { return "bauta_" + dir.String() }

func filterParent(dir direction) uint32 {
	return [...]uint32{netlink.HANDLE_MIN_EGRESS, netlink.HANDLE_MIN_INGRESS}[dir]
}

// markQdisc remembers that the clsact qdisc of a device is ours: a directory,
// because a bpffs holds nothing else but objects.
func markQdisc(root string, index int) string {
	return filepath.Join(root, fmt.Sprintf("clsact_%d", index))
}

func attachTC(root string, a *attachment, dir direction, prog *ebpf.Program) error {
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: a.index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	switch err := netlink.QdiscAdd(qdisc); {
	case err == nil:
		if err := os.Mkdir(markQdisc(root, a.index), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("remember the qdisc: %w", err)
		}
	case !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("add clsact: %w", err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: a.index,
			Parent:    filterParent(dir),
			Handle:    filterHandle,
			Priority:  filterPriority,
			Protocol:  unix.ETH_P_ALL,
		},
		Fd:           prog.FD(),
		Name:         filterName(dir),
		DirectAction: true,
	}
	if err := netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("add filter (priority %d taken by a filter of another kind?): %w", filterPriority, err)
	}
	return nil
}

// ownFilters returns our filters of one direction.
func ownFilters(index int, dir direction) ([]netlink.Filter, error) {
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}}
	all, err := netlink.FilterList(link, filterParent(dir))
	if err != nil {
		return nil, err
	}
	var own []netlink.Filter
	for _, f := range all {
		if b, ok := f.(*netlink.BpfFilter); ok && b.Name == filterName(dir) {
			own = append(own, f)
		}
	}
	return own, nil
}

func hasFilter(index int, dir direction) bool {
	own, err := ownFilters(index, dir)
	return err == nil && len(own) > 0
}

// detachTC removes our filters, and the qdisc if we made it and nobody else has a
// filter in it by now.
func detachTC(root string, index int) error {
	for _, dir := range []direction{egress, ingress} {
		own, err := ownFilters(index, dir)
		if err != nil {
			return fmt.Errorf("list filters: %w", err)
		}
		for _, f := range own {
			if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("delete filter: %w", err)
			}
		}
	}
	mark := markQdisc(root, index)
	if _, err := os.Stat(mark); err != nil {
		return nil
	}
	link := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}}
	for _, dir := range []direction{egress, ingress} {
		if foreign, err := netlink.FilterList(link, filterParent(dir)); err != nil || len(foreign) > 0 {
			return nil
		}
	}
	qdisc := &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
	if err := netlink.QdiscDel(qdisc); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete clsact: %w", err)
	}
	return os.Remove(mark)
}
