package agent

import (
	"context"
	"fmt"
	"slices"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
)

// toPrograms gives netfilter's connections to the programs. When nothing is left, or long
// enough after, the caller takes the rules away, and calls finish.
func (s *modeSwitch) toPrograms(ctx context.Context) (out switched, err error) {
	// Before the first program: it lets netfilter's packets pass, and claims their ports.
	if err := s.maps.SetHandover(true); err != nil {
		return out, err
	}
	s.note("the programs let netfilter's packets pass")
	// The programs are there. Pods' packets come translated: rules are in force.
	if err := s.programs.Start(ctx); err != nil {
		return out, err
	}
	s.note("programs are there")
	// Mappings that are netfilter's keep its ports from flows that the programs get.
	if err := s.reserve(ctx); err != nil {
		return out, err
	}
	s.note("ports of netfilter are kept free")
	// New connections come with the pod's address, and get a mapping.
	if err := s.rules.Ready(ctx); err != nil {
		return out, err
	}
	s.note("programs have new connections")
	if err := s.reserve(ctx); err != nil { // those that came since
		return out, err
	}
	s.note("programs know netfilter's connections")
	if out.Moved, err = s.passToPrograms(ctx); err != nil {
		return out, err
	}
	left, err := s.left(ctx)
	out.Left = len(left)
	for _, c := range left {
		if a := c.Xlate.Addr(); !s.wants(c) && !slices.Contains(s.kept, a) {
			s.kept = append(s.kept, a)
		}
	}
	return out, err
}

// left are the connections that netfilter still translates for pods.
func (s *modeSwitch) left(ctx context.Context) (list []conntrack.Flow, err error) {
	translated, err := s.translated(ctx)
	for _, c := range translated {
		if c.SNAT && (s.wants(c) || s.stays != nil && s.stays(c)) {
			list = append(list, c)
		}
	}
	return list, err
}

func (s *modeSwitch) wants(c conntrack.Flow) bool { return s.wanted == nil || s.wanted(c) }

// finish ends a handover to the programs.
func (s *modeSwitch) finish() error { return s.maps.SetHandover(false) }

// reserve imports what netfilter translates, as netfilter's.
func (s *modeSwitch) reserve(ctx context.Context) error {
	translated, err := s.translated(ctx)
	if err != nil {
		return err
	}
	var flows []datapath.Flow
	for _, c := range translated {
		if !movable(c) || !s.wants(c) {
			continue
		}
		f := datapath.Flow{
			Proto: c.Proto, Src: c.Src, Dst: c.Remote, Xlate: c.Xlate, State: c.State, Side: datapath.SideAway,
			Packets: [2]uint32{uint32(c.Packets[0]), uint32(c.Packets[1])}, Bytes: c.Bytes,
		}
		flows = append(flows, f)
	}
	// One that is refused, because another flow has its port, ends with netfilter.
	_, _, err = s.maps.Import(ctx, flows)
	if err != nil {
		return fmt.Errorf("import connections: %w", err)
	}
	return nil
}

// passToPrograms moves the mappings that are netfilter's, or were held when a switch was
// cut off.
func (s *modeSwitch) passToPrograms(ctx context.Context) (moved int, err error) {
	flows, known, err := s.both(ctx)
	if err != nil {
		return 0, err
	}
	var todo []datapath.Flow
	for _, f := range flows {
		if f.Side != datapath.SideOurs {
			todo = append(todo, f)
		}
	}
	for batch := range s.batches(todo) {
		if err := s.batchToPrograms(ctx, batch, known); err != nil {
			return moved, err
		}
		moved += len(batch)
	}
	return moved, nil
}

func (s *modeSwitch) batchToPrograms(ctx context.Context, batch []datapath.Flow, known map[flowKey]conntrack.Flow) error {
	var entries []conntrack.Flow
	for _, f := range batch {
		entries = append(entries, plain(described(f, known[keyOf(f)])))
	}
	// Answers wait: with the old entry they must not be translated, without it they must be.
	if _, err := s.maps.SetSide(ctx, batch, datapath.SideHeld); err != nil {
		return err
	}
	// What leaves without an entry is new to netfilter, and gets none that translates: there is
	// no rule. That is as good as ours. Ours keeps the service that the pod called.
	_, err := s.tracked.Replace(ctx, entries)
	if _, err = refusals(err); err != nil {
		return err
	}
	_, err = s.maps.SetSide(ctx, batch, datapath.SideOurs)
	return err
}
