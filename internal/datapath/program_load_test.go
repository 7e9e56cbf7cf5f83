package datapath

import (
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/rlimit"

	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// The verifier takes the programs with all that the kernel has, without one feature
// each, and with nothing that 5.10 does not have. It removes the branches not taken,
// so each set is a program of its own.
func TestProgramsLoad(t *testing.T) {
	t.Parallel()
	labtest.Root(t)
	if err := rlimit.RemoveMemlock(); err != nil { // as Open does
		t.Fatal(err)
	}
	have, err := Probe()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("tier: %s", have.Tier())
	loads := func(name string, set Features) {
		t.Run(name, func(t *testing.T) { loadAll(t, set) })
	}
	loads("all", have)
	for f, k := range kernelFeatures {
		if (k.knob != "" || Feature(f) == Workqueues) && have.Has(Feature(f)) {
			loads("without "+k.name, have.Without(Feature(f)))
		}
	}
	loads("lowest", 0)
}

// loadAll loads every program that there is for a set of features, with maps that
// nobody else sees.
func loadAll(t *testing.T, set Features) {
	spec, err := loadMasq()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range spec.Maps {
		m.Pinning = ebpf.PinNone
	}
	if err := set.set(spec); err != nil {
		t.Fatal(err)
	}
	for name := range spec.Programs {
		if strings.HasPrefix(name, "reclaim_") && name != set.reclaimer() {
			delete(spec.Programs, name)
		}
	}
	c, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		Programs: ebpf.ProgramOptions{LogLevel: ebpf.LogLevelStats}})
	if err != nil {
		t.Fatalf("%+v", err)
	}
	defer c.Close()
	for name, p := range c.Programs {
		// Not from the program's info, which has it only from kernel 5.16 on.
		t.Logf("%s: %s", name, regexp.MustCompile("processed .*").FindString(p.VerifierLog))
	}
}

// Without its feature no program but those of expiry calls a kernel function: a kernel that lacks one, or a
// JIT compiler, refuses such a call even where it is never reached. Needs no privileges.
func TestLowestCallsNoKernelFunction(t *testing.T) {
	spec, err := loadMasq()
	if err != nil {
		t.Fatal(err)
	}
	calls := func() (n int) {
		for name, p := range spec.Programs {
			if strings.HasPrefix(name, "reclaim_") {
				continue
			}
			for _, ins := range p.Instructions {
				if ins.IsKfuncCall() {
					n++
				}
			}
		}
		return n
	}
	if calls() == 0 {
		t.Error("the programs call no kernel function, so this test shows nothing")
	}
	if err := Features(0).set(spec); err != nil {
		t.Fatal(err)
	}
	if n := calls(); n != 0 {
		t.Errorf("%d calls are left", n)
	}
}

// The bit of ip_summed is found behind structures and unions without names, and only
// where it is a field of two bits.
func TestMemberBit(t *testing.T) {
	u8 := &btf.Int{Size: 1}
	field := func(name string, at, size btf.Bits) btf.Member {
		return btf.Member{Name: name, Type: u8, Offset: at, BitfieldSize: size}
	}
	group := func(at btf.Bits, members ...btf.Member) btf.Member {
		return btf.Member{Type: &btf.Union{Members: []btf.Member{{Type: &btf.Struct{Members: members}}}}, Offset: at}
	}
	named := btf.Member{Name: "other", Type: &btf.Struct{Members: []btf.Member{field("ip_summed", 1, 2)}}}
	for _, c := range []struct {
		name    string
		members []btf.Member
		bit     uint32
		ok      bool
	}{
		{"plain", []btf.Member{field("len", 0, 0), field("ip_summed", 37, 2)}, 37, true},
		{"nested", []btf.Member{field("len", 0, 0), group(1024, field("pkt_type", 0, 3), field("ip_summed", 5, 2))}, 1029, true},
		{"no bit field", []btf.Member{field("ip_summed", 32, 0)}, 0, false},
		{"of another structure", []btf.Member{named}, 0, false},
		{"missing", []btf.Member{field("len", 0, 0)}, 0, false},
	} {
		if bit, ok := memberBit(c.members, "ip_summed"); ok != c.ok || ok && bit != c.bit {
			t.Errorf("%s: %d, %v, want %d, %v", c.name, bit, ok, c.bit, c.ok)
		}
	}
}

// Every constant of the programs that a probe sets is in the table of features, and
// the other way round. Needs no privileges.
func TestKnobsMirror(t *testing.T) {
	spec, err := loadMasq()
	if err != nil {
		t.Fatal(err)
	}
	var inC, inGo []string
	for name := range spec.Variables {
		if strings.HasPrefix(name, "have_") {
			inC = append(inC, name)
		}
	}
	for _, k := range kernelFeatures {
		if k.knob != "" {
			inGo = append(inGo, k.knob)
		}
	}
	slices.Sort(inC)
	slices.Sort(inGo)
	if !slices.Equal(inC, inGo) {
		t.Errorf("knobs:\n in C  %v\n in Go %v", inC, inGo)
	}
}

// The name of a tier begins with the hook.
func TestTierNames(t *testing.T) {
	var all Features
	for _, f := range AllFeatures() {
		all |= 1 << f
	}
	for _, c := range []struct {
		set  Features
		want string
	}{
		{0, "tc"},
		{all.Without(TCX, Loop, Timers, ForEach, FIBSource, Workqueues, IPSummed), "tc, IPv6 checksum flag, atomics"},
		{all, "tcx, IPv6 checksum flag, atomics, for-each, timers, loop, route source, workqueues, checksum state"},
	} {
		if got := c.set.Tier(); got != c.want {
			t.Errorf("%b: %q, want %q", c.set, got, c.want)
		}
	}
}

// The enum outcome of the data plane and the outcomes of package policy are one
// list: name by name and number by number. Needs no privileges.
func TestOutcomesMirror(t *testing.T) {
	spec, err := loadMasq()
	if err != nil {
		t.Fatal(err)
	}
	var enum *btf.Enum
	if err := spec.Types.TypeByName("outcome", &enum); err != nil {
		t.Fatal(err)
	}
	inC := make(map[string]uint64)
	for _, v := range enum.Values {
		inC[v.Name] = v.Value
	}
	want := map[string]uint64{"OUT_CONTINUE": uint64(policy.Continue), "OUT_SLOTS": policy.OutcomeSlots}
	for _, o := range policy.Outcomes() {
		name := []byte("OUT_" + o.Name)
		for i, c := range name {
			switch {
			case c == '-':
				name[i] = '_'
			case c >= 'a' && c <= 'z':
				name[i] = c - 'a' + 'A'
			}
		}
		want[string(name)] = uint64(o.Outcome)
	}
	if !reflect.DeepEqual(inC, want) {
		t.Errorf("outcomes:\n in C  %v\n in Go %v", inC, want)
	}
	if spec.Maps["counters"].MaxEntries != policy.OutcomeSlots*4 {
		t.Errorf("%d counters, want %d", spec.Maps["counters"].MaxEntries, policy.OutcomeSlots*4)
	}
}

// Sizes of what both sides read. The generated types have the fields; this holds
// the number of bytes against the BTF that the kernel checks map values with.
func TestTypesMirror(t *testing.T) {
	spec, err := loadMasq()
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]any{
		"addr": masqAddr{}, "flow": masqFlow{}, "tuple": masqTuple{}, "tuple4": masqTuple4{}, "flow4": masqFlow4{}, "flow6": masqFlow6{},
		"inbound": masqInbound{}, "prefix": masqPrefix{}, "rule": masqRule{}, "setting": masqSetting{}, "state": masqState{},
		"device": masqDevice{}, "counter": masqCounter{}, "reap_record": masqReapRecord{}, "datagram": masqDatagram{}, "fragment": masqFragment{},
	} {
		var s *btf.Struct
		if err := spec.Types.TypeByName(name, &s); err != nil {
			t.Error(err)
			continue
		}
		if got := uint32(reflect.TypeOf(value).Size()); got != s.Size {
			t.Errorf("struct %s: %d bytes in C, %d in Go", name, s.Size, got)
		}
	}
	for name, m := range spec.Maps {
		if len(name) > 15 {
			t.Errorf("map %s: the kernel cuts the name", name)
		}
		if m.KeySize == 0 || m.ValueSize == 0 {
			t.Errorf("map %s: key of %d bytes, value of %d", name, m.KeySize, m.ValueSize)
		}
	}
}

// Constants that are in no BTF, because the preprocessor eats them.
func TestConstantsMirror(t *testing.T) {
	inC := make(map[string]uint64)
	for _, file := range []string{"maps.h", "reap.h", "config.h"} {
		text, err := os.ReadFile("../../bpf/" + file)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^#define (\w+) (\w+)`).FindAllStringSubmatch(string(text), -1) {
			if n, err := strconv.ParseUint(m[2], 0, 64); err == nil {
				inC[m[1]] = n
			}
		}
	}
	for name, want := range map[string]uint64{
		"FLOW_SYN": bitSyn, "FLOW_FIN": bitFin, "FLOW_RST": bitRst, "FLOW_DATA": bitData, "FLOW_HOST": bitHost,
		"FLOW_OUT": bitOut, "FLOW_OUT_FIN": bitOutFin, "FLOW_AWAY": bitAway, "FLOW_HELD": bitHeld,
		"MAP_LAYOUT": mapLayout, "REAP_BATCH": reapBatch, "REAP_START": reapStart,
	} {
		if got, ok := inC[name]; !ok || got != want {
			t.Errorf("%s: %d in C, %d in Go", name, got, want)
		}
	}
	if inC["MAX_COMPLETE"] < 2048 || inC["MAX_CANDIDATES"] < 512 {
		t.Error("a pool of 2048 ports must be searched completely, a larger one for 512 candidates (contract 2.3)")
	}
}
