package datapath

import (
	"errors"
	"slices"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// Verdicts of the tc hooks (linux/pkt_cls.h).
const (
	verdictNext     = ^uint32(0) // TC_ACT_UNSPEC
	verdictDrop     = 2          // TC_ACT_SHOT
	verdictRedirect = 7          // TC_ACT_REDIRECT
)

// skbContext is struct __sk_buff (linux/bpf.h); a test run takes the named fields.
type skbContext struct {
	_              [9]uint32
	IngressIfindex uint32 // only at egress: kernel 5.10 takes none but 0
	Ifindex        uint32
	_              [29]uint32
	WireLen        uint32
	GSOSegs        uint32
	_              [2]uint32
	GSOSize        uint32
	_              [3]uint32
}

// result is what a program did with a packet.
type result struct {
	outcome policy.Outcome
	moved   map[policy.Outcome]uint64 // by how much each counter of this direction moved
	data    []byte
	told    bool // a forwarded packet that was refused went back as an ICMP error
}

// run runs a program on a frame that leaves or arrives at dev, and checks that
// exactly one counter moves and that the verdict is the one of this outcome.
func (r *rig) run(dir direction, dev string, link packet.Link, frame []byte) result {
	r.t.Helper()
	res := r.runContext(dir, link, frame, skbContext{Ifindex: uint32(r.device[dev])}, 1)
	if len(res.moved) != 1 || res.moved[res.outcome] != 1 {
		r.t.Fatalf("%s: counters moved: %v, want one by one", dir, res.moved)
	}
	return res
}

func (r *rig) runContext(dir direction, link packet.Link, frame []byte, ctx skbContext, repeat uint32) result {
	r.t.Helper()
	verdict, data := r.execute(dir, link, frame, ctx, repeat)
	res := result{data: data, moved: r.movedTo(dir, r.readMoved(repeat))}
	for outcome := range res.moved {
		res.outcome = max(res.outcome, outcome) // more than one: of repeated runs
	}
	want := uint32(verdictNext)
	if v := res.outcome.Verdict(); v == policy.Drop || v == policy.Hold {
		want = verdictDrop
	}
	res.told = ctx.IngressIfindex != 0 && verdict == verdictRedirect
	if verdict != want && repeat == 1 && !res.told {
		r.t.Fatalf("%s: %s with verdict %d, want %d", dir, res.outcome, int32(verdict), int32(want))
	}
	if res.outcome.Verdict() == policy.Pass && !slices.Equal(res.data, frame) {
		r.t.Fatalf("%s: %s changed the packet\n was %x\n is  %x", dir, res.outcome, frame, res.data)
	}
	if dir == egress && verdict == verdictNext && repeat == 1 {
		if n := r.sentinel(link, res.data, ctx); n != 0 {
			r.t.Fatalf("egress: %s: the leak sentinel counts %d packets: %x", res.outcome, n, res.data)
		}
	}
	return res
}

// execute runs a program and returns its verdict and what it made of the frame.
func (r *rig) execute(dir direction, link packet.Link, frame []byte, ctx skbContext, repeat uint32) (uint32, []byte) {
	r.t.Helper()
	opt := ebpf.RunOptions{Data: frame, DataOut: make([]byte, len(frame)+64), Context: ctx, Repeat: repeat}
	prog, err := r.d.program(dir, link != packet.Raw)
	r.must(err)
	verdict, err := r.runIn(prog, &opt)
	if err != nil {
		r.t.Fatalf("%s of %d bytes: %v", dir, len(frame), err)
	}
	return verdict, opt.DataOut
}

// runIn runs a program in the namespace of the rig, where the devices are.
func (r *rig) runIn(prog *ebpf.Program, opt *ebpf.RunOptions) (verdict uint32, err error) {
	err = r.ns.Do(func() error {
		verdict, err = prog.Run(opt)
		return err
	})
	return verdict, err
}

// batch runs many frames of one direction that all have one outcome: translations,
// to the bytes in want, or a drop or a pass without change. The counters are read
// once, which takes longer than a run does.
type batch struct {
	r       *rig
	dir     direction
	outcome policy.Outcome
	n       uint64
}

func (r *rig) batch(dir direction, outcome policy.Outcome) *batch {
	return &batch{r: r, dir: dir, outcome: outcome}
}

func (b *batch) run(what func() string, link packet.Link, frame, want []byte) {
	b.r.t.Helper()
	verdict, got := b.r.execute(b.dir, link, frame, skbContext{Ifindex: uint32(b.r.device["eth0"])}, 1)
	b.n++
	if b.outcome.Verdict() == policy.Drop {
		if verdict != verdictDrop {
			b.r.t.Fatalf("%s: %s: verdict %d, want %s", b.dir, what(), int32(verdict), b.outcome)
		}
		return
	}
	if b.outcome.Verdict() == policy.Pass {
		want = frame
	}
	if verdict != verdictNext || !slices.Equal(got, want) {
		b.r.t.Fatalf("%s: %s: verdict %d, want %s\n was  %x\n want %x\n got  %x", b.dir, what(), int32(verdict), b.outcome, frame, want, got)
	}
}

// end checks the counters.
func (b *batch) end() {
	b.r.t.Helper()
	if moved := b.r.moved(b.dir); moved[b.outcome] != b.n || len(moved) > 1 {
		b.r.t.Fatalf("%s: counters moved: %v, want %s by %d", b.dir, moved, b.outcome, b.n)
	}
}

// sentinel shows a packet to the leak sentinel, and returns how many it counts.
func (r *rig) sentinel(link packet.Link, frame []byte, ctx skbContext) uint64 {
	r.t.Helper()
	before := r.leaked(ctx.Ifindex)
	out := make([]byte, len(frame)+64)
	opt := ebpf.RunOptions{Data: frame, DataOut: out, Context: ctx}
	var verdict uint32
	err := r.ns.Do(func() error {
		prog, err := r.d.program(sentinel, link != packet.Raw)
		if err == nil {
			verdict, err = prog.Run(&opt)
		}
		return err
	})
	if err != nil {
		r.t.Fatalf("sentinel, link %d, %x: %v", link, frame, err)
	}
	if verdict != verdictNext || !slices.Equal(opt.DataOut, frame) {
		r.t.Fatalf("the sentinel: verdict %d, was %x, is %x", int32(verdict), frame, opt.DataOut)
	}
	return r.leaked(ctx.Ifindex) - before
}

// leaked is what the sentinel has counted on a device.
func (r *rig) leaked(index uint32) (n uint64) {
	r.t.Helper()
	var perCPU []masqLeakCount
	err := r.d.objs.Leaked.Lookup(index, &perCPU)
	if !errors.Is(err, ebpf.ErrKeyNotExist) {
		r.must(err)
	}
	for _, c := range perCPU {
		n += c.Packets
	}
	return n
}
