package datapath

import (
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Values of reclaim.by, as in bpf/reclaim.h.
const (
	reclaimByTimer = 1
	reclaimByWork  = 2
)

// reclaimTiming is when the kernel begins to expire flows by itself; tests hurry it.
type reclaimTiming struct {
	after  uint32 // seconds without a sweep of the agent
	period time.Duration
}

// probeWorkqueues looks for the functions that programs call: helpers they are not, and
// no promise of the kernel either. 7.2 has another type of bpf_wq_set_callback_impl, with
// which the program does not load.
func probeWorkqueues() (bool, error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return false, nil // a kernel without BTF offers no such functions
	}
	spec, err := loadMasq()
	if err != nil {
		return false, err
	}
	for _, name := range []string{"bpf_wq_init", "bpf_wq_set_callback_impl", "bpf_wq_start"} {
		f, err := kernelFunction(kernel, spec, name)
		if err != nil || f == nil {
			return false, err
		}
	}
	return true, nil
}

// reclaimer names the program that arms expiry in the kernel, if there is one for
// these features.
func (s Features) reclaimer() string {
	switch {
	case !s.Has(Timers) || !s.Has(ForEach):
		return ""
	case s.Has(Workqueues):
		return "reclaim_work"
	}
	return "reclaim_timer"
}

// armReclaim starts what expires flows while no agent runs, where the kernel has the
// means, or gives it this version's program. It is tried until it succeeds: the
// kernel may have no memory for a timer just now.
func (d *Datapath) armReclaim() {
	name := d.features.reclaimer()
	if d.armed || d.old != nil || name == "" {
		return
	}
	if err := d.runReclaim(name); err != nil {
		if !d.armWarned {
			d.opt.Log.Warn("no expiry in the kernel while the agent is down, retrying", "error", err)
			d.armWarned = true
		}
		return
	}
	d.armed = true
	d.opt.Log.Debug("expiry in the kernel is ready", "program", name)
}

// runReclaim loads one of the programs that arm the timer and runs it. The timer
// keeps the program, and the pin of its map keeps the timer.
func (d *Datapath) runReclaim(name string) error {
	spec, err := d.specForMaps()
	if err != nil {
		return err
	}
	room := lowWater * float64(d.objs.Reverse4.MaxEntries())
	if err := spec.Variables["reclaim_room"].Set(uint32(room)); err != nil {
		return err
	}
	if t := d.opt.reclaim; t != nil {
		err = errors.Join(spec.Variables["reclaim_after"].Set(t.after), spec.Variables["reclaim_period"].Set(uint64(t.period)))
		if err != nil {
			return err
		}
	}
	spec.Programs = map[string]*ebpf.ProgramSpec{name: spec.Programs[name]}
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{MapReplacements: d.objs.byName()})
	if err != nil {
		return fmt.Errorf("load %s: %w", name, err)
	}
	defer coll.Close()
	ret, err := coll.Programs[name].Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if err == nil && int32(ret) < 0 {
		err = unix.Errno(-int32(ret))
	}
	if err != nil {
		return fmt.Errorf("run %s: %w", name, err)
	}
	return nil
}

// reclaimTier names what expires flows while the agent is down.
func (i *Inspector) reclaimTier() string {
	var r masqReclaimState
	if m := i.maps[pinReclaim]; m == nil || m.Lookup(uint32(0), &r) != nil {
		return "no expiry without the agent"
	}
	switch r.By {
	case reclaimByTimer:
		return "expiry without the agent by a timer"
	case reclaimByWork:
		return "expiry without the agent by a workqueue"
	}
	return "no expiry without the agent"
}
