package datapath

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// fewCapsEnv makes the test below the process with the least capabilities, for the
// root directory that it names; lowestEnv leaves out all features.
const (
	fewCapsEnv = "BAUTA_TEST_FEW_CAPABILITIES"
	lowestEnv  = "BAUTA_TEST_LOWEST_TIER"
)

// CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON are enough to take over, to attach and to
// look; our own program is then no program ahead of ours.
func TestAttachWithFewCapabilities(t *testing.T) {
	if root := os.Getenv(fewCapsEnv); root != "" {
		var without []Feature
		if os.Getenv(lowestEnv) != "" {
			without = AllFeatures()
		}
		withFewCapabilities(t, root, without)
		return
	}
	eachHook(t, func(t *testing.T, without []Feature, hook Hook) {
		topo := labtest.NewNode(t, lab.Options{})
		b := newBench(t, topo.Node, Options{Without: without})
		b.apply(nodePolicy(t, topo))
		b.close()
		env := fewCapsEnv + "=" + b.opt.Root
		tier := lowestEnv + "="
		if without != nil {
			tier += "1"
		}
		out, err := topo.Node.Run(within(t, time.Minute), "env", env, tier, os.Args[0], "-test.run=^TestAttachWithFewCapabilities$", "-test.v")
		if err != nil || !strings.Contains(out, hookSeen+string(hook)) {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

const hookSeen = "attached by "

func withFewCapabilities(t *testing.T, root string, without []Feature) {
	runtime.LockOSThread()
	few := [2]unix.CapUserData{}
	for _, c := range []int{unix.CAP_NET_ADMIN, unix.CAP_PERFMON, unix.CAP_BPF} {
		few[c/32].Effective |= 1 << (c % 32)
		few[c/32].Permitted |= 1 << (c % 32)
	}
	if err := unix.Capset(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &few[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := ebpf.NewProgramFromID(1); !errors.Is(err, os.ErrPermission) {
		t.Fatalf("more capabilities than meant: %v", err)
	}
	look := func(when string, got []Attachment, err error) {
		t.Helper()
		if err != nil || len(got) != 1 || len(got[0].Ahead) != 0 {
			t.Fatalf("%s: %+v, %v", when, got, err)
		}
		t.Logf("%s%s", hookSeen, got[0].Hook)
	}
	inspect := func(when string) {
		t.Helper()
		in, err := Inspect(root)
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		got, err := in.Attachments()
		look(when, got, err)
	}
	inspect("with the agent down")
	d, err := Open(Options{Root: root, Without: without, AllowPrivateBPFFS: true})
	if err != nil {
		t.Fatal(text(err))
	}
	defer d.Close()
	look("taken over", d.Attached(), nil)
	inspect("taken over")
	dev, err := net.InterfaceByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	in := loopPolicy(ports(40000, 10))
	in.Devices[0].Name, in.Devices[0].Index = dev.Name, dev.Index
	p, err := policy.Build(in)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Apply(context.Background(), p); err != nil {
		t.Fatal(text(err))
	}
	if _, err := d.Sweep(context.Background()); err != nil || !d.Healthy() {
		t.Errorf("%v, healthy %t", err, d.Healthy())
	}
	look("applied", d.Attached(), nil)
	inspect("applied")
}

// Without CAP_PERFMON the verifier finds fault with the code; the kernel is not to blame.
func TestLoadErrorWithoutPerfmon(t *testing.T) {
	refused := fmt.Errorf("pointer arithmetic with it prohibited for !root: %w", unix.EACCES)
	hint := func() string { return strings.Join(advice.Of(loadError("/", refused)), "; ") }
	if got := hint(); trusted() && got != noEBPF {
		t.Errorf("with all privileges: %s", got)
	}
	labtest.Root(t)
	runtime.LockOSThread() // and no other test gets this thread
	var caps [2]unix.CapUserData
	few := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	caps[0].Effective = 1 << unix.CAP_NET_ADMIN
	caps[0].Permitted = caps[0].Effective
	if err := unix.Capset(&few, &caps[0]); err != nil {
		t.Fatal(err)
	}
	if got := hint(); got != needPrivilege {
		t.Errorf("without: %s", got)
	}
}
