package datapath

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/policy"
)

// twin is an instance of the egress program for questions, with the tables that are its own.
type twin struct {
	Egress    *ebpf.Program `ebpf:"egress_ether"`
	Counters  *ebpf.Map     `ebpf:"counters"`
	Pods      *ebpf.Map     `ebpf:"pods"`
	Shares    *ebpf.Map     `ebpf:"shares"`
	Refusals  *ebpf.Map     `ebpf:"refusals"`
	Fragments *ebpf.Map     `ebpf:"fragments"`
	Forward4  *ebpf.Map     `ebpf:"forward4"`
	Forward6  *ebpf.Map     `ebpf:"forward6"`
	Reverse4  *ebpf.Map     `ebpf:"reverse4"`
	Reverse6  *ebpf.Map     `ebpf:"reverse6"`
	Inbound4  *ebpf.Map     `ebpf:"inbound4"`
	Inbound6  *ebpf.Map     `ebpf:"inbound6"`

	sizes twinSizes
}

// twinSizes are the entries that the forward and reverse tables of a twin have room for.
// They are exact where the live table is full, and nothing is to find any.
type twinSizes struct {
	forward, reverse         uint32
	forwardFull, reverseFull bool
}

// twinRoom is enough for what one packet meets and makes.
const twinRoom = 64

// own are the tables that each answer begins anew with.
func (t *twin) own() []*ebpf.Map {
	return []*ebpf.Map{t.Forward4, t.Forward6, t.Reverse4, t.Reverse6, t.Inbound4, t.Inbound6, t.Pods, t.Refusals, t.Fragments}
}

func (t *twin) tables(ipv4 bool) flowTables {
	if ipv4 {
		return flowTables{t.Forward4, t.Reverse4, t.Inbound4, true}
	}
	return flowTables{t.Forward6, t.Reverse6, t.Inbound6, false}
}

func (t *twin) Close() {
	_MasqClose(t.Egress, t.Counters, t.Shares)
	for _, m := range t.own() {
		m.Close()
	}
}

// loadTwin loads the program once more. What it only reads are the live tables; all
// others are new, and nobody else has them.
func (e *Explainer) loadTwin(sizes twinSizes) (*twin, error) {
	spec, err := loadMasq()
	if err != nil {
		return nil, fmt.Errorf("read the embedded programs: %w", err)
	}
	if err := e.features.set(spec); err != nil {
		return nil, err
	}
	for name, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
		switch {
		case e.shared[name] != nil:
			m.MaxEntries = e.shared[name].MaxEntries()
		case name == pinForward4 || name == pinForward6:
			m.MaxEntries = sizes.forward
		case name == pinReverse4 || name == pinReverse6:
			m.MaxEntries = sizes.reverse
		case name == pinInbound4 || name == pinInbound6 || slices.Contains(copiedPins, name) && name != pinShares:
			m.MaxEntries = twinRoom
		}
	}
	t := &twin{sizes: sizes}
	if err := spec.LoadAndAssign(t, &ebpf.CollectionOptions{MapReplacements: e.shared}); err != nil {
		return nil, loadError(e.in.root, err)
	}
	return t, nil
}

// takeOutcome finds the one counter that a run has moved, and sets it back.
func (t *twin) takeOutcome() (policy.Outcome, error) {
	for slot := range t.Counters.MaxEntries() {
		var perCPU []masqCounter
		if err := t.Counters.Lookup(slot, &perCPU); err != nil {
			return 0, fmt.Errorf("read counters: %w", err)
		}
		if !slices.ContainsFunc(perCPU, func(c masqCounter) bool { return c.Packets != 0 }) {
			continue
		}
		if err := t.Counters.Put(slot, make([]masqCounter, len(perCPU))); err != nil {
			return 0, fmt.Errorf("reset counter: %w", err)
		}
		return policy.Outcome(slot / 4), nil
	}
	return 0, errors.New("the program has counted nothing") // finish() counts every packet
}
