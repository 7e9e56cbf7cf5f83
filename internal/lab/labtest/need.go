package labtest

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// Reason is why a test does not run. There is no skip without one.
type Reason string

const (
	// NotRoot: the test needs the privileges of root.
	NotRoot Reason = "not root"
	// NoTool: a program is not installed.
	NoTool Reason = "tool missing"
	// OldKernel: the running kernel is older than a Feature.
	OldKernel Reason = "kernel too old"
	// NewKernel: the running kernel has it no longer.
	NewKernel Reason = "kernel too new"
	// OtherMode: the test has no place in the mode of this run.
	OtherMode Reason = "another mode"
)

// Feature is something that a kernel release brought.
type Feature struct {
	Name         string
	Major, Minor int
}

// Features that tests ask for.
var (
	TCX         = Feature{"TCX attachment", 6, 6}
	BPFTimer    = Feature{"BPF timers", 5, 15}
	BPFWork     = Feature{"BPF workqueues", 6, 10}
	BPFLoop     = Feature{"bpf_loop", 5, 17}
	RingBuffer  = Feature{"BPF ring buffer", 5, 8}
	BatchLookup = Feature{"batched map operations", 5, 6}
	CompleteRun = Feature{"test run with CHECKSUM_COMPLETE", 6, 11}
)

// Root stops a test that runs without root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, NotRoot, "run it with sudo")
	}
}

// Tool returns the path of a program, and stops a test if there is none.
func Tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, NoTool, name)
	}
	return path
}

// Kernel skips a test on a kernel older than the feature. On any other kernel
// the test runs, and its failure is a failure, also if the feature is broken.
func Kernel(t testing.TB, f Feature) {
	t.Helper()
	major, minor, release := kernelVersion(t)
	if major < f.Major || major == f.Major && minor < f.Minor {
		// Also in CI: the matrix runs old kernels on purpose.
		t.Skipf("%s: %s needs %d.%d, this is %s", OldKernel, f.Name, f.Major, f.Minor, release)
	}
}

func kernelVersion(t testing.TB) (major, minor int, release string) {
	t.Helper()
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		t.Fatalf("uname: %v", err)
	}
	release = unix.ByteSliceToString(u.Release[:])
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		t.Fatalf("kernel release %q: %v", release, err)
	}
	return major, minor, release
}

// missing skips for a developer, and fails where the environment is ours.
func missing(t testing.TB, why Reason, detail string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("%s: %s (not skipped, since CI is set)", why, detail)
	}
	t.Skipf("%s: %s", why, detail)
}
