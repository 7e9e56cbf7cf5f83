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
func (q *quota) settle(ctx context.Context, prog *ebpf.Program, usage [2]Usage) error {
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
	// Pods that came during the walk count from their first flow on, and still do.
	share := masqShare{}
	if err := eachEntry(q.pods, func(k masqAddr, _ masqPod) bool {
		share.Pods[familyOf(addrFrom(k))]++
		return true
	}); err != nil {
		return fmt.Errorf("read pods: %w", err)
	}
	share.Flows = q.share(share.Pods, usage)
	if err := q.shares.Put(uint32(0), share); err != nil {
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

// share says how many mappings a pod may hold: 0, any number, for one that is alone
// in its family.
//
// Of the table a pod may take its share. While there is room below the low-water
// mark it may also take that, on top of the largest holding: the next walk is some
// seconds away, and nobody may fill the table until then. Shares of ports are worked
// out by the programs, from the number of pods.
func (q *quota) share(pods [2]uint32, usage [2]Usage) (most [2]uint32) {
	var largest [2]int
	for a, n := range q.counted {
		f := familyOf(a)
		largest[f] = max(largest[f], n)
	}
	for f, n := range pods {
		if n < 2 {
			continue
		}
		flows := max(usage[f].Limit/int(n), 1)
		if room := int(lowWater*float64(usage[f].Limit)) - usage[f].Flows; room > 0 {
			flows = max(flows, largest[f]+room)
		}
		most[f] = uint32(flows)
	}
	return most
}

// familyOf is the enum family of bpf/packet.h.
func familyOf(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}
