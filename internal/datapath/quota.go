package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// podIdle is how long an address without mappings still counts as one that wants some.
const podIdle = time.Minute

// quota keeps the books of the pods: the programs add and subtract, the walk
// counts anew, and works out what a fair share is. One walk after another uses it.
type quota struct {
	pods, shares *ebpf.Map

	before  map[netip.Addr]masqPod // when the walk began
	counted map[netip.Addr]int     // by the walk
	drift   map[netip.Addr]int     // by how much the last walk disagreed
}

func (q *quota) begin() error {
	q.before, q.counted = make(map[netip.Addr]masqPod), make(map[netip.Addr]int)
	err := eachEntry(q.pods, func(k masqAddr, v masqPod) bool {
		q.before[addrFrom(k)] = v
		return true
	})
	if err != nil {
		return fmt.Errorf("read pods: %w", err)
	}
	return nil
}

// add counts a forward entry.
func (q *quota) add(e flowEntry) {
	if !e.host() {
		q.counted[e.key.local.Addr()]++
	}
}

// settle corrects the counts and writes the shares.
func (q *quota) settle(ctx context.Context, prog *ebpf.Program, pool int, usage [2]Usage) error {
	now, err := monotonic()
	if err != nil {
		return err
	}
	r := reaper{prog: prog}
	drift := make(map[netip.Addr]int)
	for a, pod := range q.before {
		n := q.counted[a]
		if n == 0 && pod.Flows == 0 && int64(pod.FlowsDue) < int64(now-podIdle) {
			// A mapping that is made just now is found by the next walk.
			delete(q.before, a)
			if err := q.pods.Delete(addrTo(a)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
				return fmt.Errorf("remove pod: %w", err)
			}
			continue
		}
		// Flows come while the walk goes on. Only what two walks say is wrong.
		drift[a] = n - int(int32(pod.Flows))
		if by := common(drift[a], q.drift[a]); by != 0 {
			drift[a] -= by
			if err := r.add(ctx, masqReapRecord{Key: masqTuple{Local: addrTo(a)}, Table: reapPod, Percent: uint32(int32(by))}); err != nil {
				return err
			}
		}
	}
	q.drift = drift
	if err := r.flush(ctx); err != nil {
		return err
	}
	for a, n := range q.counted {
		if _, known := q.before[a]; known {
			continue
		}
		err := q.pods.Update(addrTo(a), masqPod{Flows: uint32(n)}, ebpf.UpdateNoExist)
		if errors.Is(err, unix.E2BIG) {
			break // not counted, and so not bounded
		}
		if err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return fmt.Errorf("write pod: %w", err)
		}
	}
	if err := q.shares.Put(uint32(0), q.share(pool, usage)); err != nil {
		return fmt.Errorf("write shares: %w", err)
	}
	return nil
}

// common is the part of two differences that they agree on.
func common(a, b int) int {
	switch {
	case a > 0 && b > 0:
		return min(a, b)
	case a < 0 && b < 0:
		return max(a, b)
	}
	return 0
}

// share says what a pod may hold. Who is alone in its family may take everything.
//
// Ports are scarce towards one remote, which nobody counts by pod: so a pod with
// more mappings than its share of the pool is kept out of the upper part of the
// pool towards every remote, and there are ports left for those with fewer.
//
// Of the table a pod may take its share. While there is room below the low-water
// mark it may also take that, on top of the largest holding: the next walk is some
// seconds away, and nobody may fill the table until then.
func (q *quota) share(pool int, usage [2]Usage) (s masqShare) {
	var active, largest [2]int
	for a, n := range q.counted {
		f := familyOf(a)
		active[f]++
		largest[f] = max(largest[f], n)
	}
	for a := range q.before {
		if q.counted[a] == 0 {
			active[familyOf(a)]++
		}
	}
	for f, n := range active {
		if n < 2 {
			continue
		}
		s.Ports[f] = uint32(max(pool/n, 1))
		flows := max(usage[f].Limit/n, 1)
		if room := int(lowWater*float64(usage[f].Limit)) - usage[f].Flows; room > 0 {
			flows = max(flows, largest[f]+room)
		}
		s.Flows[f] = uint32(flows)
	}
	return s
}

// familyOf is the enum family of bpf/packet.h.
func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
