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
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
)

// Features is what the running kernel offers, found by trying, never by version.
type Features struct {
	TCX         bool // ordered, pinned attachment; kernel 6.6
	CoarseClock bool // bpf_ktime_get_coarse_ns; 5.11
	CsumIPv6    bool // BPF_F_IPV6 of bpf_l4_csum_replace; 6.16 and stable trees
}

// loopback has index 1 in every network namespace.
const loopback = 1

// Probe tries the kernel. An error means that eBPF mode cannot work at all.
func Probe() (Features, error) {
	var f Features
	if err := features.HaveProgramType(ebpf.SchedCLS); err != nil {
		if errors.Is(err, os.ErrPermission) {
			return f, hint(fmt.Errorf("load a tc program: %w", err), needPrivilege)
		}
		return f, hint(fmt.Errorf("load a tc program: %w", err), noEBPF)
	}
	_, err := link.QueryPrograms(link.QueryOptions{Target: loopback, Attach: ebpf.AttachTCXEgress})
	f.TCX = err == nil
	f.CoarseClock = features.HaveProgramHelper(ebpf.SchedCLS, asm.FnKtimeGetCoarseNs) == nil
	f.CsumIPv6, err = probeCsumIPv6()
	return f, err
}

// probeCsumIPv6 runs bpf_l4_csum_replace with the flag: unknown ones are EINVAL.
func probeCsumIPv6() (bool, error) {
	const pseudoHeader, ipv6 = 1 << 4, 1 << 7
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS,
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R2, 50),
			asm.Mov.Imm(asm.R3, 0),
			asm.Mov.Imm(asm.R4, 0),
			asm.Mov.Imm(asm.R5, pseudoHeader|ipv6),
			asm.FnL4CsumReplace.Call(),
			asm.Return(),
		},
		License: "Dual BSD/GPL",
	})
	if err != nil {
		return false, fmt.Errorf("load a tc program: %w", err)
	}
	defer prog.Close()
	ret, err := prog.Run(&ebpf.RunOptions{Data: make([]byte, 64)})
	if errors.Is(err, ebpf.ErrNotSupported) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("run a tc program: %w", err)
	}
	return int32(ret) == 0, nil
}

// set writes the features into the constants of the programs.
func (f Features) set(spec *ebpf.CollectionSpec) error {
	for name, have := range map[string]bool{
		"have_coarse_clock": f.CoarseClock,
		"have_csum_ipv6":    f.CsumIPv6,
	} {
		v := uint8(0)
		if have {
			v = 1
		}
		if err := spec.Variables[name].Set(v); err != nil {
			return fmt.Errorf("set %s: %w", name, err)
		}
	}
	return nil
}

// ObjectTag names the embedded programs: the beginning of their SHA-256.
func ObjectTag() string {
	sum := sha256.Sum256(_MasqBytes)
	return hex.EncodeToString(sum[:6])
}

// Tier names the features for humans, for example "tcx, coarse clock, ipv6 checksum flag".
func (f Features) Tier() string {
	tier := []string{"tc"}
	if f.TCX {
		tier[0] = "tcx"
	}
	if f.CoarseClock {
		tier = append(tier, "coarse clock")
	}
	if f.CsumIPv6 {
		tier = append(tier, "IPv6 checksum flag")
	}
	return strings.Join(tier, ", ")
}
