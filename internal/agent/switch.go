package agent

import (
	"cmp"
	"context"
	"errors"
	"iter"
	"log/slog"
	"net/netip"
	"slices"

	"bauta.dev/bauta/internal/conntrack"
	"bauta.dev/bauta/internal/datapath"
)

// mappings are the flow tables of the programs.
type mappings interface {
	SetHandover(on bool) error
	Flows(context.Context) ([]datapath.Flow, error)
	Import(context.Context, []datapath.Flow) (taken int, refused []datapath.Refusal, err error)
	SetSide(context.Context, []datapath.Flow, datapath.Side) (int, error)
	Forget(context.Context, []datapath.Flow) (int, error)
	Shifted(context.Context) ([]datapath.Flow, error)
}

// connections is netfilter's table.
type connections interface {
	List(context.Context, conntrack.Filter) ([]conntrack.Flow, error)
	Create(context.Context, []conntrack.Flow) (int, error)
	Replace(context.Context, []conntrack.Flow) (int, error)
	Delete(context.Context, []conntrack.Flow) (int, error)
}

// starter is a translator, as far as new connections go.
type starter interface {
	// Ready makes it translate what it has, and nothing new. Netfilter tracks every packet
	// of pods from then on.
	Ready(context.Context) error
	// Start gives it new connections.
	Start(context.Context) error
}

// modeSwitch moves running connections from one translator to the other.
//
// Three facts make it safe. A connection that netfilter tracks without translating it stays
// that way whatever the rules are, and goes on through the programs. A connection of
// which netfilter translates the packets that leave passes the programs, because of the
// handover. And its answers are translated by one side only: netfilter, unless its mapping
// is ours. So in each state between two steps each connection has one translator for
// each direction, but for a batch that is held: its answers are dropped for the length of a
// few system calls.
//
// Every step may be repeated, and a switch that was cut off is begun again from the
// start, in the same direction or in the other: both look at what there is.
type modeSwitch struct {
	maps     mappings
	tracked  connections
	programs starter
	rules    starter
	sources  []netip.Prefix // of pods
	// wanted tells whether the programs may take a connection that netfilter translates: it leaves
	// by a masquerade device, and with an address of it.
	wanted func(conntrack.Flow) bool
	// stays tells whether one that they may not take has to be waited for; nil: none.
	stays func(conntrack.Flow) bool
	batch int          // how many connections are held at a time; 0: switchBatch
	log   *slog.Logger // nil: none

	// refused are connections that netfilter did not take. With rules in force they must not be
	// tried again: without an entry they are new ones.
	refused map[flowKey]bool
	kept    []netip.Addr // addresses of connections that stay
}

type switched struct {
	Moved int // connections
	Left  int // that stay with the old side until they end
	Stuck int // of these, associations of SCTP that the rules drop
}

const (
	// switchBatch connections are moved in less than 1 ms.
	switchBatch = 64
	// switchPasses is how often the connections that were made meanwhile are moved too.
	switchPasses = 3
)

type flowKey struct {
	proto    uint8
	src, dst netip.AddrPort // dst: whom the packets reach
}

func keyOf(f datapath.Flow) flowKey         { return flowKey{f.Proto, f.Src, f.Dst} }
func keyOfTracked(f conntrack.Flow) flowKey { return flowKey{f.Proto, f.Src, f.Remote} }

// movable tells whether a connection is addresses and ports, and no more.
func movable(f conntrack.Flow) bool {
	return f.Zone == 0 && f.Helper == "" && !f.Expected && !f.SeqAdjust && f.ICMPType == 0 && f.ICMPCode == 0
}

// known are netfilter's connections of pods, by whom they are between. Where several zones
// have the same, it is that of zone 0: no other can be moved.
func (s *modeSwitch) known(ctx context.Context) (map[flowKey]conntrack.Flow, error) {
	flows, err := s.tracked.List(ctx, conntrack.Filter{Sources: s.sources, AnyZone: true})
	out := make(map[flowKey]conntrack.Flow, len(flows))
	for _, f := range flows {
		if key := keyOfTracked(f); f.Zone == 0 || out[key].Zone != 0 || !out[key].Src.IsValid() {
			out[key] = f
		}
	}
	return out, err
}

// both reads the mappings of the programs and, by whom they are between, netfilter's connections.
func (s *modeSwitch) both(ctx context.Context) ([]datapath.Flow, map[flowKey]conntrack.Flow, error) {
	flows, err := s.maps.Flows(ctx)
	if err != nil {
		return nil, nil, err
	}
	known, err := s.known(ctx)
	return flows, known, err
}

// batches are as many mappings as are held at a time.
func (s *modeSwitch) batches(flows []datapath.Flow) iter.Seq[[]datapath.Flow] {
	return slices.Chunk(flows, cmp.Or(s.batch, switchBatch))
}

// translated are those that netfilter translates, of all zones.
func (s *modeSwitch) translated(ctx context.Context) ([]conntrack.Flow, error) {
	return s.tracked.List(ctx, conntrack.Filter{Sources: s.sources, Translated: true, AnyZone: true})
}

// toRules gives the connections of the programs to netfilter. When nothing is left, or
// long enough after, the caller takes the programs away.
func (s *modeSwitch) toRules(ctx context.Context) (out switched, err error) {
	s.refused = make(map[flowKey]bool)
	// Netfilter's packets pass the programs from here on; there are none yet.
	if err := s.maps.SetHandover(true); err != nil {
		return out, err
	}
	s.note("netfilter's packets pass the programs")
	// New connections are theirs already, unless a switch was cut off: then rules are in force.
	if err := s.programs.Start(ctx); err != nil {
		return out, err
	}
	s.note("programs have their policy")
	// From here on netfilter tracks what pods send. The packet of a connection that it did not
	// know is a new one to it: not translated, as there is no rule yet. The programs do it.
	if err := s.rules.Ready(ctx); err != nil {
		return out, err
	}
	s.note("netfilter tracks pods")
	for range switchPasses {
		// Their mappings stay until forget, so that no new flow of the programs gets their ports.
		if n, err := s.passToRules(ctx); err != nil {
			return out, err
		} else if n == 0 {
			break
		}
	}
	s.note("connections moved")
	// What is with the programs still must not be new to netfilter when there are rules.
	if err := s.track(ctx); err != nil {
		return out, err
	}
	s.note("netfilter knows the rest")
	// New connections leave translated, and pass the programs.
	if err := s.rules.Start(ctx); err != nil {
		return out, err
	}
	s.note("rules have new connections")
	if err := s.programs.Ready(ctx); err != nil {
		return out, err
	}
	s.note("programs take nothing new")
	// The last ones of the programs. With the rules in force a packet between the two
	// entries would be translated as a new one: to the same port, unless that was not the
	// pod's own. That is why so few are moved only now.
	if _, err := s.passToRules(ctx); err != nil {
		return out, err
	}
	return s.forget(ctx)
}

// note logs a state between two steps.
func (s *modeSwitch) note(step string) {
	if s.log != nil {
		s.log.Debug("mode change", "step", step)
	}
}

// forget removes the mappings of what netfilter has.
func (s *modeSwitch) forget(ctx context.Context) (out switched, err error) {
	flows, err := s.maps.Flows(ctx)
	if err != nil {
		return out, err
	}
	var away []datapath.Flow
	for _, f := range flows {
		if f.Side == datapath.SideAway {
			away = append(away, f)
		}
	}
	if out.Moved, err = s.maps.Forget(ctx, away); err != nil {
		return out, err
	}
	shifted, err := s.maps.Shifted(ctx)
	out.Left = len(flows) - len(away) + len(shifted)
	return out, err
}

// track makes netfilter know the connections of the programs, as not translated.
func (s *modeSwitch) track(ctx context.Context) error {
	flows, known, err := s.both(ctx)
	if err != nil {
		return err
	}
	var unknown []conntrack.Flow
	for _, f := range flows {
		if _, ok := known[keyOf(f)]; !ok {
			unknown = append(unknown, plain(described(f, conntrack.Flow{})))
		}
	}
	_, err = s.tracked.Create(ctx, unknown)
	_, err = refusals(err) // known by a packet, meanwhile
	return err
}

// releaseAll ends what the programs still have, before they go.
func (s *modeSwitch) releaseAll(ctx context.Context) error {
	flows, err := s.maps.Flows(ctx)
	if err != nil {
		return err
	}
	// An answer that the programs translated now would look to netfilter like a connection from
	// outside, and what the pod says like the answer to that.
	if _, err := s.maps.SetSide(ctx, flows, datapath.SideHeld); err != nil {
		return err
	}
	return s.release(ctx, flows)
}

// release makes netfilter forget connections that it knows as not translated, because the
// programs did that, when these have them no more: with the entry they would leave as they are.
func (s *modeSwitch) release(ctx context.Context, flows []datapath.Flow) error {
	if len(flows) == 0 {
		return nil
	}
	known, err := s.known(ctx)
	if err != nil {
		return err
	}
	var untranslated []conntrack.Flow
	for _, f := range flows {
		if c, ok := known[keyOf(f)]; ok && c.Xlate == c.Src {
			untranslated = append(untranslated, c)
		}
	}
	_, err = s.tracked.Delete(ctx, untranslated)
	return err
}

// refusals are what netfilter did not take; another error remains one.
func refusals(err error) ([]conntrack.Refusal, error) {
	var refused *conntrack.RefusedError
	if errors.As(err, &refused) {
		return refused.Refused, nil
	}
	return nil, err
}

// described is what netfilter is to know of a mapping. old is what it knows now.
func described(f datapath.Flow, old conntrack.Flow) conntrack.Flow {
	c := conntrack.Flow{
		Proto: f.Proto, Src: f.Src, Dst: f.Dst, Xlate: f.Xlate, Remote: f.Dst, State: f.State, Timeout: f.Timeout,
		Packets: [2]uint64{uint64(f.Packets[0]), uint64(f.Packets[1])},
	}
	if old.Dst.IsValid() { // the pod calls a service, whose endpoint the programs see
		c.Dst, c.Mark, c.SCTPTags = old.Dst, old.Mark, old.SCTPTags
	}
	return c
}

// plain is the same connection with its own source.
func plain(c conntrack.Flow) conntrack.Flow {
	c.Xlate, c.ID = c.Src, 0
	return c
}

// passToRules moves the mappings there are.
func (s *modeSwitch) passToRules(ctx context.Context) (moved int, err error) {
	flows, known, err := s.both(ctx)
	if err != nil {
		return 0, err
	}
	bound, err := s.bound(ctx)
	if err != nil {
		return 0, err
	}
	var done, todo []datapath.Flow
	for _, f := range flows {
		switch old, ok := known[keyOf(f)]; {
		case ok && old.Xlate != old.Src:
			if f.Side != datapath.SideAway { // a switch that was cut off came this far
				done = append(done, f)
			}
		case s.refused[keyOf(f)], bound[flowKey{f.Proto, f.Xlate, f.Dst}]:
		case !ok || movable(old):
			todo = append(todo, f)
		}
	}
	if moved, err = s.maps.SetSide(ctx, done, datapath.SideAway); err != nil {
		return moved, err
	}
	for batch := range s.batches(todo) {
		n, err := s.batchToRules(ctx, batch, known)
		moved += n
		if err != nil {
			return moved, err
		}
	}
	return moved, nil
}

// bound are the external sockets, with the remote, that the node uses too, under another port:
// to netfilter both flows would be one. Neither can leave the programs.
func (s *modeSwitch) bound(ctx context.Context) (map[flowKey]bool, error) {
	shifted, err := s.maps.Shifted(ctx)
	out := make(map[flowKey]bool, len(shifted))
	for _, f := range shifted {
		out[keyOf(f)] = true
	}
	return out, err
}

// batchToRules moves some mappings.
func (s *modeSwitch) batchToRules(ctx context.Context, batch []datapath.Flow, known map[flowKey]conntrack.Flow) (int, error) {
	byKey := make(map[flowKey]datapath.Flow)
	var entries []conntrack.Flow
	for _, f := range batch {
		byKey[keyOf(f)] = f
		entries = append(entries, described(f, known[keyOf(f)]))
	}
	// Answers wait. What leaves goes through the programs until the entry is there, then
	// through netfilter, to the same port.
	if _, err := s.maps.SetSide(ctx, batch, datapath.SideHeld); err != nil {
		return 0, err
	}
	_, err := s.tracked.Replace(ctx, entries)
	refused, err := refusals(err)
	if err != nil {
		return 0, err
	}
	var back []datapath.Flow
	var untranslated []conntrack.Flow
	for _, r := range refused {
		key := keyOfTracked(r.Flow)
		back, untranslated = append(back, byKey[key]), append(untranslated, plain(r.Flow))
		delete(byKey, key)
		s.refused[key] = true
	}
	// What netfilter did not take stays where it was, and known to netfilter.
	_, err = s.tracked.Create(ctx, untranslated)
	if _, err = refusals(err); err != nil {
		return 0, err
	}
	if _, err := s.maps.SetSide(ctx, back, datapath.SideOurs); err != nil {
		return 0, err
	}
	// Answers go on, and are netfilter's.
	var gone []datapath.Flow
	for _, f := range batch {
		if _, ok := byKey[keyOf(f)]; ok {
			gone = append(gone, f)
		}
	}
	return s.maps.SetSide(ctx, gone, datapath.SideAway)
}
