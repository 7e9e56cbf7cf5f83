package datapath

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
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

// aheadName is the name of a second ingress filter, in front of the one that a
// migration is going to remove.
const aheadName = "bauta_ingress_next"

func filterParent(dir direction) uint32 {
	return [...]uint32{netlink.HANDLE_MIN_EGRESS, netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS}[dir]
}

func clsact(index int) netlink.Qdisc {
	return &netlink.GenericQdisc{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT},
		QdiscType:  "clsact",
	}
}

// kindClsact is the only kind of qdisc with a place for egress filters. The older
// kind "ingress" has the same handle and takes what is meant for egress as well:
// into its only chain, where it would run on packets that arrive.
const kindClsact = "clsact"

// filterQdisc is the kind of qdisc that holds the filters of a device; "" without one.
func filterQdisc(index int) (string, error) {
	device := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: index}}
	all, err := dump(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(device) })
	if err != nil {
		return "", fmt.Errorf("list qdiscs: %w", err)
	}
	for _, q := range all {
		if q.Attrs().Parent == netlink.HANDLE_CLSACT {
			return q.Type(), nil
		}
	}
	return "", nil
}

// attachTC adds our filter, or gives the one that is there another program.
func attachTC(root string, a *attachment, dir direction, prog *ebpf.Program) error {
	if err := addQdisc(root, a.index); err != nil {
		return err
	}
	err := checkQdisc(a)
	if err == nil {
		err = putFilter(a.index, dir, prog)
	}
	if err == nil {
		err = checkQdisc(a) // it may have been another's turn in between
	}
	if noEgress := (*Error)(nil); errors.As(err, &noEgress) {
		return errors.Join(err, deleteFilters(a.index))
	}
	return err
}

// addQdisc adds a clsact qdisc unless something is there already.
func addQdisc(root string, index int) error {
	switch err := netlink.QdiscAdd(clsact(index)); {
	case err == nil:
		if err := os.Mkdir(markQdisc(root, index), 0o700); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("remember the qdisc: %w", err)
		}
	case !errors.Is(err, unix.EEXIST):
		return fmt.Errorf("add clsact: %w", err)
	}
	return nil
}

// checkQdisc returns an Error unless the filters of a device are in a clsact qdisc.
func checkQdisc(a *attachment) error {
	kind, err := filterQdisc(a.index)
	if err != nil || kind == kindClsact {
		return err
	}
	if kind == "" {
		return errors.New("the clsact qdisc was removed meanwhile")
	}
	return advice.New(fmt.Errorf("device %s has an %s qdisc, which has no place for egress filters (replace it by clsact)", a.name, kind),
		fmt.Sprintf("its filters go with it, those for arriving packets fit into clsact as well: "+
			"tc qdisc del dev %s %s && tc qdisc add dev %s clsact", a.name, kind, a.name))
}

func newFilter(index int, dir direction, prog *ebpf.Program) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs:  netlink.FilterAttrs{LinkIndex: index, Parent: filterParent(dir), Handle: filterHandle, Protocol: unix.ETH_P_ALL},
		Fd:           prog.FD(),
		Name:         filterName(dir),
		DirectAction: true,
	}
}

func putFilter(index int, dir direction, prog *ebpf.Program) error {
	own, err := ownFilters(index, dir)
	if err != nil {
		return err
	}
	filter := newFilter(index, dir, prog)
	if len(own) > 0 {
		// What is there already is not written again: each write is news to all that listen.
		info, err := prog.Info()
		if err != nil {
			return err
		}
		if id, ok := info.ID(); ok && own[0].(*netlink.BpfFilter).Id == int(id) {
			return nil
		}
		filter.Priority, filter.Handle = own[0].Attrs().Priority, own[0].Attrs().Handle
		if err := netlink.FilterReplace(filter); err != nil {
			return fmt.Errorf("replace filter: %w", err)
		}
		return nil
	}
	if dir == sentinel {
		return addFilterLast(filter)
	}
	return addFilter(filter)
}

// putAheadFilter puts a second ingress filter in front of the one there is. Of the
// filters of one priority the newest runs first.
func putAheadFilter(index int, prog *ebpf.Program) error {
	own, err := ownFilters(index, ingress)
	if err != nil {
		return err
	}
	if len(own) == 0 {
		return putFilter(index, ingress, prog) // nothing to be in front of
	}
	filter := newFilter(index, ingress, prog)
	filter.Name, filter.Priority, filter.Handle = aheadName, own[0].Attrs().Priority, own[0].Attrs().Handle
	if isAhead(own[0]) {
		return netlink.FilterReplace(filter)
	}
	filter.Handle ^= 1
	if err := netlink.FilterAdd(filter); err != nil {
		return fmt.Errorf("add filter: %w", err)
	}
	if own, err = ownFilters(index, ingress); err != nil || len(own) == 0 || !isAhead(own[0]) {
		return errors.Join(err, errors.New("the new filter is not in front of the old one"), dropAheadFilter(index))
	}
	return nil
}

// settleAheadFilter removes the filter behind the one that was put ahead, which gets its name.
func settleAheadFilter(index int, prog *ebpf.Program) error {
	own, err := ownFilters(index, ingress)
	if err != nil || len(own) == 0 || !isAhead(own[0]) {
		return err
	}
	for _, f := range own[1:] {
		if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete filter: %w", err)
		}
	}
	filter := newFilter(index, ingress, prog)
	filter.Priority, filter.Handle = own[0].Attrs().Priority, own[0].Attrs().Handle
	if err := netlink.FilterReplace(filter); err != nil {
		return fmt.Errorf("replace filter: %w", err)
	}
	return nil
}

// dropAheadFilter undoes putAheadFilter.
func dropAheadFilter(index int) error {
	own, err := ownFilters(index, ingress)
	for _, f := range own {
		if isAhead(f) {
			if e := netlink.FilterDel(f); e != nil && !errors.Is(e, unix.ENOENT) {
				err = errors.Join(err, fmt.Errorf("delete filter: %w", e))
			}
		}
	}
	return err
}

// addFilterLast adds a filter behind all others.
func addFilterLast(f *netlink.BpfFilter) (err error) {
	for n := range uint16(lastPriority) {
		f.Priority = 65535 - n
		if err = netlink.FilterAdd(f); !taken(err) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("add filter: %w", err)
	}
	return nil
}

// taken tells whether a priority can't be had because of another filter. EEXIST: the
// handle is another's; EINVAL: the priority is one of another kind or protocol.
func taken(err error) bool { return errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EINVAL) }

// addFilter adds a filter as far ahead as it can be without touching another one.
func addFilter(f *netlink.BpfFilter) (err error) {
	for f.Priority = firstPriority; f.Priority <= lastPriority; f.Priority++ {
		if err = netlink.FilterAdd(f); !taken(err) {
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
	return ok && (b.Name == filterName(dir) || dir == ingress && b.Name == aheadName)
}

func isAhead(f netlink.Filter) bool {
	b, ok := f.(*netlink.BpfFilter)
	return ok && b.Name == aheadName
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

// hasFilter tells whether a filter of ours runs in a direction.
func hasFilter(index int, dir direction) bool {
	own, err := ownFilters(index, dir)
	if err != nil || len(own) == 0 {
		return false
	}
	kind, err := filterQdisc(index)
	return err == nil && kind == kindClsact
}

// leftFilters tells whether filters of ours are on a device, also where they do no good.
func leftFilters(index int) (bool, error) {
	n := 0
	var errs []error
	for _, dir := range backwards {
		own, err := ownFilters(index, dir)
		n += len(own)
		errs = append(errs, err)
	}
	return n > 0, errors.Join(errs...)
}

// deleteFilters removes our filters, the last one first to leave as it came.
func deleteFilters(index int) error {
	for _, dir := range backwards {
		if err := deleteFilter(index, dir); err != nil {
			return err
		}
	}
	return nil
}

func deleteFilter(index int, dir direction) error {
	own, err := ownFilters(index, dir)
	if err != nil {
		return err
	}
	for _, f := range own {
		if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("delete filter: %w", err)
		}
	}
	return nil
}

// detachTC removes our filters, and the qdisc if we made it and nobody else has a
// filter in it by now.
func detachTC(root string, index int) error {
	if err := deleteFilters(index); err != nil {
		return err
	}
	if !marked(root, index) {
		return nil
	}
	for _, dir := range directions {
		if foreign, err := listFilters(index, dir); err != nil || len(foreign) > 0 {
			return err // the qdisc is theirs from now on
		}
	}
	switch kind, err := filterQdisc(index); {
	case err != nil:
		return err
	case kind == kindClsact:
		if err := netlink.QdiscDel(clsact(index)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("delete clsact: %w", err)
		}
	}
	removeMark(root, index)
	return nil
}

// marked tells whether the qdisc of a device is ours.
func marked(root string, index int) bool {
	_, err := os.Stat(markQdisc(root, index))
	return err == nil
}

// removeMark forgets that a qdisc is ours; a mark that stays is no harm.
func removeMark(root string, index int) { os.Remove(markQdisc(root, index)) }
