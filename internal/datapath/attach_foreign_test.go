package datapath

import (
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"bauta.dev/bauta/internal/lab"
)

// chain describes all that is attached to a device: "" if nothing is.
func chain(t testing.TB, ns *lab.NS, dev string) (s string) {
	t.Helper()
	err := ns.Do(func() error {
		l, err := netlink.LinkByName(dev)
		if err != nil {
			return err
		}
		for _, dir := range directions {
			if res, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: dir.tcx()}); err == nil {
				for _, p := range res.Programs {
					s += fmt.Sprintf("%s tcx %s\n", dir, programName(p.ID))
				}
			}
			filters, err := listFilters(l.Attrs().Index, dir)
			if err != nil {
				return err
			}
			for _, f := range filters {
				name := f.Type()
				if b, ok := f.(*netlink.BpfFilter); ok {
					name = b.Name
				}
				s += fmt.Sprintf("%s tc %s priority %d\n", dir, name, f.Attrs().Priority)
			}
		}
		qdiscs, err := dump(func() ([]netlink.Qdisc, error) { return netlink.QdiscList(l) })
		for _, q := range qdiscs {
			if q.Type() == "clsact" {
				s += "clsact\n"
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// foreignProgram lets every packet go on to the next program.
func foreignProgram(t testing.TB) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: "foreign", Type: ebpf.SchedCLS, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// delFilters removes our filters of one direction, as somebody else would.
func delFilters(index int, dir direction) error {
	own, err := ownFilters(index, dir)
	for _, f := range own {
		if err := netlink.FilterDel(f); err != nil {
			return err
		}
	}
	return err
}
