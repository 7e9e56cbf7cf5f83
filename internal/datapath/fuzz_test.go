package datapath

import (
	"slices"
	"testing"

	"bauta.dev/bauta/internal/lab/packet"
)

// The fuzz tests run the programs, by BPF_PROG_TEST_RUN, on packets and states of the tables that
// the fuzzer chooses. What must hold of every packet, in fuzz_egress_test.go and fuzz_ingress_test.go:
//
//   - exactly one counter moves, the verdict is that of its name, a pass changes no byte;
//   - what leaves as it is may do so: the reason is the one of policy.Decide, or one that the
//     flows known allow;
//   - a translation changes addresses, ports and checksums and nothing else; each checksum is
//     right or wrong by the same difference as before; UDP's zero stays zero;
//   - a known flow keeps its external socket, and no two share one; its answers find their way
//     back; an error's quote is what the other side knows;
//   - a later fragment gets what the first of its own datagram got; a new connection on an old mapping
//     starts it anew; packets keep a flow, errors and fragments do not (fuzz_state_test.go);
//   - no-port and table-full are true; nothing is dropped at ingress but a fragment of SCTP.
//
// An ordinary test run executes the seeds and what testdata/fuzz has.

// kindsOfAll are the packets that a fuzz test varies, of both families.
var kindsOfAll = [2][]kind{families[0].kinds(), families[1].kinds()}

// fuzz runs f with the bytes of the fuzzer as choices; with a frame for those that take one.
func fuzz(f *testing.F, run func(w *world, frame []byte)) {
	w := newWorlds(f)
	f.Fuzz(func(t *testing.T, setup, frame []byte) {
		c := &choices{setup}
		x := w.begin(t, c)
		defer x.end()
		for range min(len(setup)/4, 4) {
			x.step()
		}
		run(x, slices.Clone(frame))
	})
}

// setups are beginnings of executions: the policy, the link, and what happens before.
func setups(link packet.Link) [][]byte {
	return [][]byte{
		{0, byte(link)},
		{1, byte(link), 0, 0, 0, 0, 0, 0},
		{0x71, byte(link) | 7<<2, 3, 2, 0, 0, 0, 0},
	}
}

// FuzzEgress lets any frame leave, and what it becomes come back.
func FuzzEgress(f *testing.F) {
	for _, fam := range families {
		for i, k := range fam.kindsOnLinks() {
			s := setups(k.p.Link)
			f.Add(s[i%len(s)], k.p.Build())
			if k.p.Port() != 0 {
				f.Add(s[(i+1)%len(s)], k.p.From(fam.pod, changedPort).Build())
			}
		}
		for _, p := range fam.zeroChecksums() {
			f.Add([]byte{0x40, byte(packet.Ethernet)}, p.Build()) // a pool of one port
		}
		for _, k := range fam.large() {
			for _, piece := range k.p.Fragments(fragmentSize)[:2] {
				f.Add(setups(packet.Ethernet)[0], piece)
			}
		}
	}
	fuzz(f, func(w *world, frame []byte) {
		if out, ok := w.egress(frame); ok {
			w.back(out)
			w.egress(frame)
		}
	})
}

// FuzzIngress lets any frame arrive, and then the same leave.
func FuzzIngress(f *testing.F) {
	for _, fam := range families {
		for i, k := range fam.kindsOnLinks() {
			s := setups(k.p.Link)
			f.Add(s[i%len(s)], k.p.Reply().Build())
		}
		f.Add(setups(packet.Ethernet)[1], fam.unreachable(fam.udp().From(fam.node, keptPort), fam.router).Build())
	}
	fuzz(f, func(w *world, frame []byte) {
		w.ingress(frame)
		w.ingress(frame)
		if v, ok := viewFrame(w.link, frame); ok {
			if a, ok := answer(v); ok {
				w.egress(a)
			}
		}
	})
}

// FuzzICMPError lets errors pass in both directions about flows that there are: the fuzzer's
// bytes choose the flow, the error, and where the quote is cut and spoiled.
func FuzzICMPError(f *testing.F) {
	for fam := range families {
		for i := range kindsOfAll[fam] {
			for _, cut := range []byte{0, 28, 48, 60} {
				f.Add([]byte{0, byte(i % 4)}, []byte{byte(i<<1 | fam), 0, 0, 0, 0, 0, 0, 0, cut, 0, 1, 0, cut, 0, 0, 1, 0})
			}
		}
	}
	for _, seed := range errorSeeds() {
		f.Add([]byte{0, byte(packet.Ethernet)}, seed)
		f.Add([]byte{0x40, byte(packet.Ethernet)}, seed) // a pool of one port
	}
	fuzz(f, func(w *world, frame []byte) {
		w.c.b = frame
		w.errors()
	})
}

// FuzzSequence lets many packets of flows that meet pass in any order.
func FuzzSequence(f *testing.F) {
	for fam := range families {
		for i := range kindsOfAll[fam] {
			one := []byte{0, byte(i<<1 | fam), 0, 0, 0, 0, 0, 0, 0, 1}
			f.Add([]byte{byte(i << 6), byte(i)}, slices.Concat(one, []byte{5, 0, 0, 6, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 0, 8}, one[1:], []byte{9}, one[1:]))
		}
	}
	for _, seed := range sequences() {
		f.Add([]byte{0, byte(packet.Ethernet)}, seed)
	}
	// Many flows of one pod: the pool and the tables come to an end.
	for _, setup := range [][]byte{{0, 0}, {0x40, 0}, {0x81, 1}} {
		var many []byte
		for i := range byte(24) {
			many = append(many, 0, 4, 0, 0, 1, 7, 9, i, 3, 3, 0, 0, 0, 0)
		}
		f.Add(setup, many)
	}
	fuzz(f, func(w *world, frame []byte) {
		w.c.b = frame
		for n := 0; n < 40 && len(w.c.b) > 0; n++ {
			w.step()
		}
	})
}
