package datapath

import (
	"context"
	"encoding/binary"
	"fmt"

	"github.com/cilium/ebpf"
)

// Tables of a reap record, as in bpf/reap.h.
const (
	reapForward uint8 = iota
	reapReverse
	reapInbound
	reapPod
	reapMark
)

const (
	reapBatch  = 64 // records of one run
	reapStart  = 16 // offset of the first one
	reapRecord = 48 // bytes of one
)

// reaper deletes entries through the in-kernel program, which looks at the clock
// and at both halves of a flow once more before it does.
type reaper struct {
	prog    *ebpf.Program
	data    []byte // records not yet sent
	removed int
}

func (r *reaper) add(ctx context.Context, rec masqReapRecord) error {
	if r.data == nil {
		r.data = make([]byte, reapStart, reapStart+reapBatch*reapRecord)
	}
	r.data = appendRecord(r.data, rec)
	if len(r.data) < cap(r.data) {
		return nil
	}
	return r.flush(ctx)
}

// appendRecord writes struct reap_record by hand: encoding/binary would take
// longer than the kernel does for the deletion.
func appendRecord(b []byte, rec masqReapRecord) []byte {
	order := binary.NativeEndian
	for _, w := range rec.Key.Local.W {
		b = order.AppendUint32(b, w)
	}
	for _, w := range rec.Key.Remote.W {
		b = order.AppendUint32(b, w)
	}
	b = order.AppendUint16(b, rec.Key.Lport)
	b = order.AppendUint16(b, rec.Key.Rport)
	b = append(b, rec.Key.Proto, 0, 0, 0)
	b = append(b, rec.Table, rec.Force, 0, 0)
	return order.AppendUint32(b, rec.Percent)
}

func (r *reaper) flush(ctx context.Context) error {
	if len(r.data) <= reapStart {
		return nil
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	n, err := r.prog.Run(&ebpf.RunOptions{Data: r.data})
	if err != nil {
		return fmt.Errorf("run the reaper: %w", err)
	}
	r.data = r.data[:reapStart]
	r.removed += int(n)
	return nil
}
