// Package conntrack reads and writes netfilter's table of connections by netlink:
// what it translates, and what it is to translate from now on.
//
// Everything is about the network namespace of the calling thread.
package conntrack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// Names of a flow's state, those of the flow tables of the data plane.
const (
	Syn         = "syn"
	Established = "established"
	Closing     = "closing"
	OneWay      = "one-way"
	TwoWay      = "two-way"
	Query       = "query"
)

// Flow is a connection as netfilter keeps it.
type Flow struct {
	Proto uint8
	// Src and Dst are what the inner host sends. Of an ICMP query the port of Src is the
	// identifier and that of Dst is 0; protocols without ports have 0.
	Src, Dst netip.AddrPort
	// Xlate is the source that the remote sees: Src if it is not translated.
	Xlate netip.AddrPort
	// Remote is whom the packets reach: Dst if that is not translated. Create takes the
	// invalid one for Dst.
	Remote netip.AddrPort
	// Created is zero if the kernel keeps no time stamps (net.netfilter.nf_conntrack_timestamp).
	Created time.Time
	// Timeout is what is left of it. Create takes 0 for what is usual in the state.
	Timeout time.Duration
	State   string
	// Packets and Bytes, of the original direction and of the replies, are zero if the
	// kernel does not count (net.netfilter.nf_conntrack_acct).
	Packets, Bytes [2]uint64
	Assured        bool
	SNAT, DNAT     bool
	// Helper is set if netfilter follows the connection's content (FTP, SIP ...), Expected if
	// such content announced it, SeqAdjust if it changed the content's length. No other
	// translator can go on with these.
	Helper              string
	Expected, SeqAdjust bool
	Zone                uint16
	Mark                uint32
	// ID tells two connections with the same addresses apart; 0: not known.
	ID uint32
	// ICMPType and ICMPCode are zero for an echo request.
	ICMPType, ICMPCode uint8
	// SCTPTags are the verification tags of the original direction and of the replies.
	// Netfilter takes no packet with another one.
	SCTPTags [2]uint32
}

// String shows a flow as an error names it.
func (f Flow) String() string {
	return fmt.Sprintf("protocol %d %s -> %s as %s", f.Proto, f.Src, f.Dst, f.Xlate)
}

// Filter says what List returns; the zero value is all of zone 0.
type Filter struct {
	// Sources are prefixes one of which Src must be in; none: any source.
	Sources []netip.Prefix
	// Translated leaves out what has its own source address and port.
	Translated bool
	// AnyZone adds the connections of other zones than 0. They are tables of their own:
	// the same addresses may be in several.
	AnyZone bool
	// Limit bounds the result; 0: MaxFlows.
	Limit int
}

// MaxFlows is how many flows List returns unless told otherwise.
const MaxFlows = 1 << 20

// ErrTooMany says that List would have returned more than its limit.
var ErrTooMany = errors.New("more connections than the limit")

func (f Filter) selects(c Flow) bool {
	if c.Zone != 0 && !f.AnyZone || f.Translated && c.Xlate == c.Src {
		return false
	}
	for _, p := range f.Sources {
		if p.Contains(c.Src.Addr()) {
			return true
		}
	}
	return len(f.Sources) == 0
}

// identity is what no two connections have in common.
type identity struct {
	proto, icmp, code uint8
	src, dst          netip.AddrPort
	zone              uint16
}

func (f Flow) identity() identity {
	return identity{f.Proto, f.ICMPType, f.ICMPCode, f.Src, f.Dst, f.Zone}
}

// dumpAttempts is how often a dump is begun again because the table changed below it.
const dumpAttempts = 5

// List returns the connections of both families that filter selects, each once.
func List(ctx context.Context, filter Filter) ([]Flow, error) {
	if filter.Limit <= 0 {
		filter.Limit = MaxFlows
	}
	t, err := open()
	if err != nil {
		return nil, err
	}
	defer t.close()
	for range dumpAttempts {
		var flows []Flow
		if flows, err = t.list(ctx, filter); !errors.Is(err, errInterrupted) {
			return flows, err
		}
	}
	return nil, err
}

func (t *table) list(ctx context.Context, filter Filter) ([]Flow, error) {
	var flows []Flow
	// A table that is made larger meanwhile is walked again from its beginning.
	seen := make(map[identity]bool)
	var stopped error
	err := t.dump(func(msg []byte) bool {
		f, ok := decode(msg)
		if !ok || !filter.selects(f) || seen[f.identity()] {
			return true
		}
		switch {
		case ctx.Err() != nil:
			stopped = ctx.Err()
		case len(flows) == filter.Limit:
			stopped = fmt.Errorf("conntrack: %w (%d)", ErrTooMany, filter.Limit)
		default:
			seen[f.identity()] = true
			flows = append(flows, f)
		}
		return stopped == nil
	})
	if stopped != nil {
		return nil, stopped
	}
	return flows, err
}

// Refusal is a flow that the kernel did not take, and why.
type Refusal struct {
	Flow Flow
	Err  error
}

// RefusedError lists flows that were not created or not deleted; the others were.
type RefusedError struct{ Refused []Refusal }

func (e *RefusedError) Error() string {
	first := e.Refused[0]
	return fmt.Sprintf("conntrack: %d connections refused, the first: %s: %v", len(e.Refused), first.Flow, first.Err)
}

func (e *RefusedError) Unwrap() []error {
	var errs []error
	for _, r := range e.Refused {
		errs = append(errs, r.Err)
	}
	return errs
}

// Create makes confirmed connections with their translation set up, so that netfilter
// translates their packets from the next one on, by whatever rules there are. It does so
// in namespaces with a NAT chain only: elsewhere nobody looks at the table. A flow that
// has its addresses in the table, in either direction, is refused (unix.EEXIST); a
// *RefusedError names all that were. n is how many were created.
func Create(ctx context.Context, flows []Flow) (n int, err error) {
	return each(ctx, flows, func(t *table, f Flow) (bool, error) {
		err := t.create(f)
		return err == nil, err
	})
}

// Replace is Create in the place of whatever has the same addresses: the translation of a
// connection can't be changed. Both are one system call for each flow, so a packet hardly ever comes
// between them; if one does, and makes an entry by the rules there are, that is replaced.
// A flow that is refused may be without an entry then.
func Replace(ctx context.Context, flows []Flow) (n int, err error) {
	return each(ctx, flows, func(t *table, f Flow) (bool, error) {
		err := t.replace(f)
		return err == nil, err
	})
}

// Delete removes connections. Those that are gone already are no error, and not counted.
func Delete(ctx context.Context, flows []Flow) (n int, err error) {
	return each(ctx, flows, (*table).remove)
}

func each(ctx context.Context, flows []Flow, do func(*table, Flow) (bool, error)) (n int, err error) {
	if len(flows) == 0 {
		return 0, nil
	}
	t, err := open()
	if err != nil {
		return 0, err
	}
	defer t.close()
	var refused []Refusal
	for _, f := range flows {
		if err := ctx.Err(); err != nil {
			return n, err
		}
		done, err := do(t, f)
		if err != nil {
			refused = append(refused, Refusal{f, err})
		}
		if done {
			n++
		}
	}
	if refused != nil {
		return n, &RefusedError{refused}
	}
	return n, nil
}
