package datapath

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
)

// Feature is something that not every kernel from 5.10 on has.
type Feature uint8

const (
	TCX        Feature = iota // ordered, pinned attachment; kernel 6.6
	CsumIPv6                  // BPF_F_IPV6 of bpf_l4_csum_replace; 6.16 and stable trees
	Atomics                   // atomic operations that return the old value; 5.12
	ForEach                   // bpf_for_each_map_elem; 5.13
	Timers                    // bpf_timer; 5.15
	Loop                      // bpf_loop; 5.17
	FIBSource                 // BPF_FIB_LOOKUP_SRC of bpf_fib_lookup; 6.7
	Workqueues                // bpf_wq; 6.10
	IPSummed                  // skb->ip_summed through bpf_cast_to_kern_ctx; 6.2
)

// kernelFeatures says of each Feature how a kernel is tried, never by version. A knob
// is a constant of bpf/config.h; without one the programs do not use the feature.
// What the verifier refuses even in dead code (Atomics, ForEach, Timers and Loop on
// kernels without them) belongs into a program that is loaded only where it is had.
var kernelFeatures = [...]struct {
	name, knob string
	have       func() (bool, error)
}{
	TCX:        {"tcx", "", probeTCX},
	CsumIPv6:   {"IPv6 checksum flag", "have_csum_ipv6", probeCsumIPv6},
	Atomics:    {"atomics", "", probeAtomics},
	ForEach:    {"for-each", "", probeHelper(asm.FnForEachMapElem)},
	Timers:     {"timers", "", probeHelper(asm.FnTimerInit)},
	Loop:       {"loop", "", probeHelper(asm.FnLoop)},
	FIBSource:  {"route source", "", probeFIBSource},
	Workqueues: {"workqueues", "", probeWorkqueues},
	IPSummed:   {"checksum state", "have_ip_summed", probeIPSummed},
}

func (f Feature) String() string { return kernelFeatures[f].name }

// AllFeatures returns every Feature; without them any kernel is as good as 5.10.
func AllFeatures() []Feature {
	all := make([]Feature, len(kernelFeatures))
	for f := range all {
		all[f] = Feature(f)
	}
	return all
}

// Features is a set of them.
type Features uint32

// Has tells whether f is in the set.
func (s Features) Has(f Feature) bool { return s>>f&1 != 0 }

// Without returns the set without some features.
func (s Features) Without(features ...Feature) Features {
	for _, f := range features {
		s &^= 1 << f
	}
	return s
}

// loopback has index 1 in every network namespace.
const loopback = 1

// Probe tries the kernel. An error means that eBPF mode cannot work at all.
func Probe() (Features, error) {
	if err := features.HaveProgramType(ebpf.SchedCLS); err != nil {
		if errors.Is(err, os.ErrPermission) {
			return 0, advice.New(fmt.Errorf("load a tc program: %w", err), needPrivilege)
		}
		return 0, advice.New(fmt.Errorf("load a tc program: %w", err), noEBPF)
	}
	var set Features
	for f, k := range kernelFeatures {
		have, err := k.have()
		if err != nil {
			return 0, fmt.Errorf("probe %s: %w", k.name, err)
		}
		if have {
			set |= 1 << f
		}
	}
	return set, nil
}

func probeTCX() (bool, error) {
	_, err := link.QueryPrograms(link.QueryOptions{Target: loopback, Attach: ebpf.AttachTCXEgress})
	return err == nil, nil
}

func probeHelper(helper asm.BuiltinFunc) func() (bool, error) {
	return func() (bool, error) { return features.HaveProgramHelper(ebpf.SchedCLS, helper) == nil, nil }
}

// probeCsumIPv6 runs bpf_l4_csum_replace with the flag: unknown ones are EINVAL.
func probeCsumIPv6() (bool, error) {
	const pseudoHeader, ipv6 = 1 << 4, 1 << 7
	ret, err := tryRun(asm.Instructions{
		asm.Mov.Imm(asm.R2, 50),
		asm.Mov.Imm(asm.R3, 0),
		asm.Mov.Imm(asm.R4, 0),
		asm.Mov.Imm(asm.R5, pseudoHeader|ipv6),
		asm.FnL4CsumReplace.Call(),
		asm.Return(),
	})
	return err == nil && ret == 0, err
}

// probeFIBSource asks for a route of no family, which is refused only behind the
// check of the flags.
func probeFIBSource() (bool, error) {
	const size, source = 64, 1 << 4 // of struct bpf_fib_lookup
	ins := asm.Instructions{asm.Mov.Imm(asm.R0, 0)}
	for at := int16(-size); at < 0; at += 8 {
		ins = append(ins, asm.StoreMem(asm.RFP, at, asm.R0, asm.DWord))
	}
	ret, err := tryRun(append(ins,
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -size),
		asm.Mov.Imm(asm.R3, size),
		asm.Mov.Imm(asm.R4, source),
		asm.FnFibLookup.Call(),
		asm.Return(),
	))
	return err == nil && ret == -int32(unix.EAFNOSUPPORT), err
}

// tryRun returns what a tc program returns for a packet of zeros.
func tryRun(ins asm.Instructions) (int32, error) {
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "Dual BSD/GPL", Instructions: ins})
	if err != nil {
		return 0, fmt.Errorf("load a tc program: %w", err)
	}
	defer prog.Close()
	ret, err := prog.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if err != nil {
		return 0, fmt.Errorf("run a tc program: %w", err)
	}
	return int32(ret), nil
}

// probeAtomics runs a compare-and-exchange of 5, which is there, by 7.
func probeAtomics() (bool, error) {
	exchange := asm.CmpXchg.Mem(asm.RFP, asm.R1, asm.DWord, -8)
	exchange.Constant = 0xf1 // the library leaves it out, and that would be an addition
	ret, err := tryRun(asm.Instructions{
		asm.Mov.Imm(asm.R0, 5),
		asm.StoreMem(asm.RFP, -8, asm.R0, asm.DWord),
		asm.Mov.Imm(asm.R1, 7),
		exchange,
		asm.LoadMem(asm.R0, asm.RFP, -8, asm.DWord),
		asm.Return(),
	})
	if refused := (*ebpf.VerifierError)(nil); errors.As(err, &refused) {
		return false, nil
	}
	return ret == 7, err
}

// kernelCast is the function by which programs get at struct sk_buff.
const kernelCast = "bpf_cast_to_kern_ctx"

// probeIPSummed reads it in a program, as rewrite.h does.
func probeIPSummed() (bool, error) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return false, nil
	}
	spec, err := loadMasq()
	if err != nil {
		return false, err
	}
	bit, ok := ipSummedBit(kernel)
	cast, err := kernelFunction(kernel, spec, kernelCast)
	if err != nil || cast == nil || !ok {
		return false, err
	}
	id, err := kernel.TypeID(cast)
	if err != nil {
		return false, fmt.Errorf("find %s: %w", kernelCast, err)
	}
	_, err = tryRun(asm.Instructions{
		{OpCode: asm.OpCode(asm.JumpClass).SetJumpOp(asm.Call), Src: asm.PseudoKfuncCall, Constant: int64(id)},
		asm.LoadMem(asm.R0, asm.R0, int16(bit/8), asm.Byte),
		asm.Return(),
	})
	if refused := (*ebpf.VerifierError)(nil); errors.As(err, &refused) {
		return false, nil
	}
	return err == nil, err
}

// kernelFunction finds a function that the programs call: nil if the kernel has none, or
// one of another type, which is no promise of the kernel's.
func kernelFunction(kernel *btf.Spec, spec *ebpf.CollectionSpec, name string) (*btf.Func, error) {
	var ours, theirs *btf.Func
	if err := spec.Types.TypeByName(name, &ours); err != nil {
		return nil, fmt.Errorf("find %s in the programs: %w", name, err)
	}
	if kernel.TypeByName(name, &theirs) != nil || btf.CheckTypeCompatibility(ours.Type, theirs.Type) != nil {
		return nil, nil
	}
	return theirs, nil
}

// ipSummedBit is where ip_summed begins in struct sk_buff, whose fields are in
// structures and unions without names.
func ipSummedBit(kernel *btf.Spec) (uint32, bool) {
	var skb *btf.Struct
	if kernel.TypeByName("sk_buff", &skb) != nil {
		return 0, false
	}
	return memberBit(skb.Members, "ip_summed")
}

func memberBit(members []btf.Member, name string) (uint32, bool) {
	for _, m := range members {
		if m.Name == name {
			return uint32(m.Offset), m.BitfieldSize == 2
		}
		var inner []btf.Member
		switch t := m.Type.(type) {
		case *btf.Struct:
			inner = t.Members
		case *btf.Union:
			inner = t.Members
		}
		if m.Name != "" {
			continue
		}
		if bit, ok := memberBit(inner, name); ok {
			return uint32(m.Offset) + bit, true
		}
	}
	return 0, false
}

// set writes the features into the constants of the programs.
func (s Features) set(spec *ebpf.CollectionSpec) error {
	for f, k := range kernelFeatures {
		if k.knob == "" {
			continue
		}
		v := uint8(0)
		if s.Has(Feature(f)) {
			v = 1
		}
		if err := spec.Variables[k.knob].Set(v); err != nil {
			return fmt.Errorf("set %s: %w", k.knob, err)
		}
	}
	if !s.Has(IPSummed) {
		removeCalls(spec, kernelCast)
		return nil
	}
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return err
	}
	bit, _ := ipSummedBit(kernel)
	if err := spec.Variables["ip_summed_bit"].Set(bit); err != nil {
		return fmt.Errorf("set ip_summed_bit: %w", err)
	}
	return nil
}

// removeCalls takes the calls of a kernel function out of the programs. The kernel resolves each before
// it removes dead code: without the function, or without a JIT compiler, it would refuse the program.
func removeCalls(spec *ebpf.CollectionSpec, function string) {
	for _, p := range spec.Programs {
		for i := range p.Instructions {
			if ins := &p.Instructions[i]; ins.IsKfuncCall() && ins.Reference() == function {
				*ins = asm.Mov.Imm(asm.R0, 0).WithSource(ins.Source())
			}
		}
	}
}

// ObjectTag names the embedded programs: the beginning of their SHA-256.
func ObjectTag() string {
	sum := sha256.Sum256(_MasqBytes)
	return hex.EncodeToString(sum[:6])
}

// Tier names the features for humans, for example "tcx, IPv6 checksum flag, atomics"; it
// begins with the hook.
func (s Features) Tier() string {
	var tier []string
	if !s.Has(TCX) {
		tier = append(tier, "tc")
	}
	for f, k := range kernelFeatures {
		if s.Has(Feature(f)) {
			tier = append(tier, k.name)
		}
	}
	return strings.Join(tier, ", ")
}
