package datapath

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"github.com/cilium/ebpf"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/lab/packet"
	"bauta.dev/bauta/internal/policy"
)

// rig runs the programs on packets by BPF_PROG_TEST_RUN. Nothing is attached: the
// devices eth0 and eth1 exist for their index only.
type rig struct {
	t      testing.TB
	ns     *lab.NS
	d      *Datapath
	device map[string]int
	counts []uint64 // packets by slot, all CPUs together
	recent []uint32 // slots, the ones that moved last in front; before kernel 5.13 only
	held   *bool    // a fragment may be held
}

// Verdicts of the tc hooks (linux/pkt_cls.h).
const (
	verdictNext     = ^uint32(0) // TC_ACT_UNSPEC
	verdictDrop     = 2          // TC_ACT_SHOT
	verdictRedirect = 7          // TC_ACT_REDIRECT
)

const rigFlows = 256

// TestProgram runs the programs packet by packet, with all that the kernel has and
// with nothing that 5.10 does not have.
func TestProgram(t *testing.T) {
	t.Parallel()
	for _, tier := range []struct {
		name    string
		without []Feature
	}{{"all", nil}, {"lowest", AllFeatures()}} {
		t.Run(tier.name, func(t *testing.T) {
			t.Parallel()
			r := newRig(t, tier.without...)
			runPrograms(t, r)
			if tier.without == nil {
				// These ask the policy's tables, which are the same everywhere.
				t.Run("Table", func(t *testing.T) { testTable(t, r.on(t)) })
				t.Run("AgreesWithDecide", func(t *testing.T) { testAgreesWithDecide(t, r.on(t)) })
			}
		})
	}
}

// runPrograms lets the tests share one data plane, because the verifier takes longer
// than most of them; each begins without flows.
func runPrograms(t *testing.T, r *rig) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, *rig)
	}{
		{"WithoutPolicy", testWithoutPolicy},
		{"TranslationIsReversible", testTranslationIsReversible},
		{"ChecksumZero", testChecksumZero},
		{"Truncated", testTruncated},
		{"TruncatedErrors", testTruncatedErrors},
		{"Errors", testErrors},
		{"Redirects", testRedirects},
		{"ErrorsWithBadQuote", testErrorsWithBadQuote},
		{"ErrorsDoNotRefresh", testErrorsDoNotRefresh},
		{"ErrorsOfOthers", testErrorsOfOthers},
		{"ErrorFragments", testErrorFragments},
		{"ErrorFragmentsShort", testErrorFragmentsShort},
		{"Fragments", testFragments},
		{"FragmentsAlone", testFragmentsAlone},
		{"FragmentNoteExpires", testFragmentNoteExpires},
		{"FragmentsThatPass", testFragmentsThatPass},
		{"FragmentsOverlap", testFragmentsOverlap},
		{"Hold", testHold},
		{"HoldForNode", testHoldForNode},
		{"HoldNothing", testHoldNothing},
		{"HoldBounds", testHoldBounds},
		{"HoldExpires", testHoldExpires},
		{"Inbound", testInbound},
		{"InboundLatePacket", testInboundLatePacket},
		{"InboundLearning", testInboundLearning},
		{"InboundNotByAnswers", testInboundNotByAnswers},
		{"InboundExpiry", testInboundExpiry},
		{"InboundExpiredArrives", testInboundExpiredArrives},
		{"Stray", testStray},
		{"EndpointIndependent", testEndpointIndependent},
		{"SimultaneousOpen", testSimultaneousOpen},
		{"OutOfWindow", testOutOfWindow},
		{"ResetStorm", testResetStorm},
		{"NodeResets", testNodeResets},
		{"ClosedPort", testClosedPort},
		{"PingIdentifierZero", testPingIdentifierZero},
		{"Host", testHost},
		{"HostCollision", testHostCollision},
		{"HostClaims", testHostClaims},
		{"HostSockets", testHostSockets},
		{"HostICMP", testHostICMP},
		{"UnknownProtocols", testUnknownProtocols},
		{"Tags", testTags},
		{"AcceleratedTags", testAcceleratedTags},
		{"Extensions", testExtensions},
		{"CompleteKinds", testCompleteKinds},
		{"HostClaimsPorts", testHostClaimsPorts},
		{"SCTPLengths", testSCTPLengths},
		{"SCTPOffloaded", testSCTPOffloaded},
		{"SCTPPorts", testSCTPPorts},
		{"SCTPChunks", testSCTPChunks},
		{"SCTPFragments", testSCTPFragments},
		{"SCTPShort", testSCTPShort},
		{"NetfilterFirst", testNetfilterFirst},
		{"NetfilterSecond", testNetfilterSecond},
		{"NetfilterElsewhere", testNetfilterElsewhere},
		{"Tunnels", testTunnels},
		{"TunnelTakesOver", testTunnelTakesOver},
		{"TunnelPorts", testTunnelPorts},
		{"TunnelList", testTunnelList},
		{"SentinelSees", testSentinelSees},
		{"SentinelExcuses", testSentinelExcuses},
		{"SentinelRouteSource", testSentinelRouteSource},
		{"SentinelPolicyChange", testSentinelPolicyChange},
		{"Heals", testHeals},
		{"LostPort", testLostPort},
		{"SamePortEverywhere", testSamePortEverywhere},
		{"KnownFlowOutlivesPolicy", testKnownFlowOutlivesPolicy},
		{"PolicyVoidsAnswers", testPolicyVoidsAnswers},
		{"Reopens", testReopens},
		{"StackedDevices", testStackedDevices},
		{"AnswersToInside", testAnswersToInside},
		{"CountsSegments", testCountsSegments},
		{"QuotaHardLimit", testQuotaHardLimit},
		{"QuotaRate", testQuotaRate},
		{"QuotaRefusalRemembered", testQuotaRefusalRemembered},
		{"PortClass", testPortClass},
		{"RefusalIsTold", testRefusalIsTold},
		{"RefusalIsNotTold", testRefusalIsNotTold},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, r.on(t)) })
	}
}

func newRig(t testing.TB, without ...Feature) *rig { return newRigFlows(t, rigFlows, without...) }

func newRigFlows(t testing.TB, flows uint32, without ...Feature) *rig {
	t.Helper()
	root := filepath.Join(labtest.BPFFS(t), "bauta")
	r := &rig{t: t, ns: labtest.NewNS(t), device: make(map[string]int), held: new(bool)}
	if err := lab.Link(r.ns, "eth0", r.ns, "eth1", lab.LinkOpts{Down: true}); err != nil {
		t.Fatal(err)
	}
	for _, dev := range []string{"eth0", "eth1"} {
		index, err := r.ns.Index(dev)
		if err != nil {
			t.Fatal(err)
		}
		r.device[dev] = index
	}
	d, err := Open(Options{Root: root, Flows: flows, Without: without, AllowPrivateBPFFS: true})
	if err != nil {
		t.Fatal(err)
	}
	r.d = d
	labtest.Close(t, d.Close)
	r.learn(false)
	r.counts = r.readCounts()
	return r
}

// on returns the rig for a subtest.
func (r *rig) on(t testing.TB) *rig {
	sub := *r
	sub.t = t
	copy(sub.counts, sub.readCounts()) // a subtest that failed may have left some unread
	if r.recent != nil {
		t.Cleanup(func() {
			if !slices.Equal(sub.readEachCount(), sub.counts) {
				t.Error("more than one counter moved in a run")
			}
		})
	}
	return &sub
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

// apply puts a policy in force and forgets all flows, and what was excluded before:
// that matters to answers that are under way.
func (r *rig) apply(in policy.Input) *policy.Policy {
	r.t.Helper()
	r.reapply(in)
	r.d.applied.removed = nil
	p := r.reapply(in)
	r.clear()
	return p
}

// reapply puts a policy in force without attaching anything.
func (r *rig) reapply(in policy.Input) *policy.Policy {
	r.t.Helper()
	p, err := policy.Build(in)
	r.must(err)
	next, err := r.d.writePolicy(context.Background(), p)
	r.must(err)
	if r.d.applied != nil {
		r.d.releaseTries(r.d.applied, next)
	}
	r.d.applied = next
	for _, index := range r.device {
		if err := r.d.objs.Devices.Delete(uint32(index)); !errors.Is(err, ebpf.ErrKeyNotExist) {
			r.must(err)
		}
	}
	for _, dev := range in.Devices {
		var v masqDevice
		for i, a := range [2]netip.Addr{dev.IPv4, dev.IPv6} {
			if a.IsValid() {
				v.Addr[i] = addrTo(a)
			}
		}
		r.must(r.d.objs.Devices.Put(uint32(dev.Index), v))
	}
	return p
}

// clear forgets flows and fragments.
func (r *rig) clear() {
	r.t.Helper()
	o := &r.d.objs
	for _, m := range []*ebpf.Map{o.Forward4, o.Forward6, o.Reverse4, o.Reverse6, o.Inbound4, o.Inbound6, o.Fragments, o.Pods, o.Refusals} {
		r.wipe(m)
	}
	if *r.held { // hundreds of places
		r.emptyHeld()
		*r.held = false
	}
}

func (r *rig) wipe(m *ebpf.Map) {
	r.t.Helper()
	key, err := m.NextKeyBytes(nil)
	for r.must(err); key != nil; r.must(err) {
		var next []byte
		// The next key first: from a deleted one the kernel starts over.
		if next, err = m.NextKeyBytes(key); err == nil {
			err = m.Delete(key)
		}
		key = next
	}
}

// learn opens or closes the time in which any arriving TCP packet opens a connection.
func (r *rig) learn(on bool) {
	r.t.Helper()
	now, err := monotonicSeconds()
	r.must(err)
	until := now - 1
	if on {
		until = now + 60
	}
	r.state(func(st *masqState) { st.LearnUntil = until })
}

func (r *rig) state(change func(*masqState)) {
	r.t.Helper()
	var st masqState
	r.must(r.d.objs.Control.Lookup(uint32(0), &st))
	change(&st)
	r.must(r.d.objs.Control.Put(uint32(0), st))
}

// counterSlots is the number of counters: by outcome, direction and family.
const counterSlots = policy.OutcomeSlots * 4

func (r *rig) readCounts() []uint64 {
	r.t.Helper()
	keys, cpus := make([]uint32, counterSlots), ebpf.MustPossibleCPU()
	perCPU := make([]masqCounter, counterSlots*cpus)
	var cursor ebpf.MapBatchCursor
	n, err := r.d.objs.Counters.BatchLookup(&cursor, keys, perCPU, nil)
	if errors.Is(err, ebpf.ErrNotSupported) { // before kernel 5.13
		return r.readEachCount()
	}
	if err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		r.t.Fatal(err)
	}
	counts := make([]uint64, counterSlots)
	for i, key := range keys[:n] {
		for _, c := range perCPU[i*cpus : (i+1)*cpus] {
			counts[key] += c.Packets
		}
	}
	return counts
}

// readEachCount reads the counters one by one.
func (r *rig) readEachCount() []uint64 {
	r.t.Helper()
	counts := make([]uint64, counterSlots)
	for slot := range counts {
		counts[slot] = r.readCount(uint32(slot))
	}
	if r.recent == nil {
		for slot := range counterSlots {
			r.recent = append(r.recent, uint32(slot))
		}
	}
	return counts
}

func (r *rig) readCount(slot uint32) (packets uint64) {
	r.t.Helper()
	var perCPU []masqCounter
	r.must(r.d.objs.Counters.Lookup(slot, &perCPU))
	for _, c := range perCPU {
		packets += c.Packets
	}
	return packets
}

// readMoved reads the counters after a run. Where they can't be had at once it stops at
// the first that moved, and the end of the test finds out if others did.
func (r *rig) readMoved(repeat uint32) []uint64 {
	r.t.Helper()
	if r.recent == nil || repeat > 1 {
		return r.readCounts()
	}
	counts := slices.Clone(r.counts)
	for i, slot := range r.recent {
		if counts[slot] = r.readCount(slot); counts[slot] != r.counts[slot] {
			copy(r.recent[1:], r.recent[:i])
			r.recent[0] = slot
			break
		}
	}
	return counts
}

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

// moved returns by how much the counters moved since it was asked last, all of which
// must be of one direction.
func (r *rig) moved(dir direction) map[policy.Outcome]uint64 {
	r.t.Helper()
	return r.movedTo(dir, r.readCounts())
}

func (r *rig) movedTo(dir direction, counts []uint64) map[policy.Outcome]uint64 {
	r.t.Helper()
	moved := make(map[policy.Outcome]uint64)
	for slot, n := range counts {
		if n == r.counts[slot] {
			continue
		}
		outcome := policy.Outcome(slot / 4)
		if slot/2%2 != int(dir) {
			r.t.Fatalf("%s: %s was counted in the other direction", dir, outcome)
		}
		moved[outcome] += n - r.counts[slot]
		*r.held = *r.held || outcome == policy.HoldFragment || outcome == policy.PassFragment
	}
	copy(r.counts, counts) // shared with the rigs of other subtests
	return moved
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

// send runs a built packet and expects an outcome; want is the packet that must
// come out, to the byte, for a translation. It returns what came out.
func (r *rig) send(dir direction, p packet.Packet, outcome policy.Outcome, want packet.Packet) []byte {
	r.t.Helper()
	res := r.run(dir, "eth0", p.Link, p.Build())
	if res.outcome != outcome {
		r.t.Fatalf("%s of %s: %s, want %s", dir, show(p), res.outcome, outcome)
	}
	if outcome.Verdict() == policy.Masquerade {
		r.same(want, res.data)
	}
	return res.data
}

// same compares a frame with a packet built from nothing.
func (r *rig) same(want packet.Packet, got []byte) {
	r.t.Helper()
	if b := want.Build(); !slices.Equal(b, got) {
		r.t.Fatalf("want %s\n want %x\n got  %x\n check: %v", show(want), b, got, packet.Check(want.Link, got))
	}
	if err := packet.Check(want.Link, got); err != nil {
		r.t.Fatalf("%s: %v", show(want), err)
	}
}

// expect sends a packet that must pass untouched (run checks the bytes), or be dropped.
func (r *rig) expect(dir direction, p packet.Packet, outcome policy.Outcome) {
	r.t.Helper()
	if outcome.Verdict() == policy.Masquerade {
		r.t.Fatalf("expect is not for translations")
	}
	r.send(dir, p, outcome, p)
}

// translate sends a packet out that must be masqueraded from source a, and
// returns it as the remote sees it. Only the port is taken from the frame.
func (r *rig) translate(p packet.Packet, outcome policy.Outcome, a netip.Addr) packet.Packet {
	r.t.Helper()
	res := r.run(egress, "eth0", p.Link, p.Build())
	if res.outcome != outcome {
		r.t.Fatalf("egress of %s: %s, want %s", show(p), res.outcome, outcome)
	}
	out := p.From(a, sourcePort(p, res.data))
	r.same(out, res.data)
	return out
}

// sourcePort reads the port or identifier where p has it.
func sourcePort(p packet.Packet, frame []byte) uint16 {
	at := p.Link.Size() + p.HeaderSize()
	switch {
	case p.IsQuery():
		at += 4
	case !p.HasPorts():
		return 0
	}
	return uint16(frame[at])<<8 | uint16(frame[at+1])
}

func show(p packet.Packet) string {
	s := fmt.Sprintf("protocol %d %s:%d > %s:%d", p.Proto, p.Src, p.SrcPort, p.Dst, p.DstPort)
	switch p.Proto {
	case packet.TCP:
		s += fmt.Sprintf(" flags %#02x", p.Flags)
	case packet.ICMP, packet.ICMPv6:
		s += fmt.Sprintf(" type %d code %d id %d", p.Type, p.Code, p.Ident)
	}
	return s
}

// flows returns the entries of one kind of table of both families.
func (r *rig) flows(pick func(flowTables) *ebpf.Map) []flowEntry {
	r.t.Helper()
	var out []flowEntry
	for _, t := range r.d.sweeper.tables {
		seq := t.all(pick(t))
		if pick(t) == t.inbound {
			seq = t.allInbound()
		}
		for e, err := range seq {
			r.must(err)
			out = append(out, e)
		}
	}
	return out
}

func forwardTable(t flowTables) *ebpf.Map { return t.forward }
func reverseTable(t flowTables) *ebpf.Map { return t.reverse }
func inboundTable(t flowTables) *ebpf.Map { return t.inbound }

// drop removes every entry of a kind of table, behind the data plane's back.
func (r *rig) drop(pick func(flowTables) *ebpf.Map) {
	r.t.Helper()
	for _, t := range r.d.sweeper.tables {
		r.wipe(pick(t))
	}
}

// age moves the clock of every entry of a kind of table back by some seconds.
func (r *rig) age(pick func(flowTables) *ebpf.Map, seconds uint32) {
	r.t.Helper()
	for _, t := range r.d.sweeper.tables {
		// The keys first: a replaced element moves to the head of its bucket, and a walk could
		// go round between two of them for ever.
		var keys [][]byte
		key, err := pick(t).NextKeyBytes(nil)
		for ; err == nil && key != nil; key, err = pick(t).NextKeyBytes(key) {
			keys = append(keys, key)
		}
		r.must(err)
		for _, key := range keys {
			value, err := pick(t).LookupBytes(key)
			r.must(err)
			// seen is the first word of every value.
			seen := nativeEndian.Uint32(value) - seconds
			nativeEndian.PutUint32(value, seen)
			r.must(pick(t).Put(key, value))
		}
	}
}
