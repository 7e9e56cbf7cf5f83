// Package labtest makes package lab convenient for tests: what it creates is
// removed at the end of the test, and what can't be created fails it.
//
// Invariants:
//
//   - A test that can't run says why with a Reason, and where it should be able
//     to run, that is with the environment variable CI set, it fails instead.
//   - A kernel that is new enough for a feature is never skipped: see Kernel.
//   - Everything random comes from Rand, whose seed is in the log of the test.
//   - Nothing is named globally, so tests may call t.Parallel.
package labtest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
)

// SeedEnv names the environment variable that replays a random test.
const SeedEnv = "BAUTA_TEST_SEED"

// PatienceEnv names the environment variable with the factor of all time-outs, for
// machines that are slow by nature, such as an emulated one.
const PatienceEnv = "BAUTA_TEST_PATIENCE"

// ThinEnv names the environment variable that thins out the largest tables of cases, for
// emulated machines: "4:1" is every fourth case beginning with number 1. Runs with 4:0 to
// 4:3 together are all cases. Without it, as everywhere else, each run has all.
const ThinEnv = "BAUTA_TEST_THIN"

// NewNode builds the standard topology for a test and removes it afterwards.
func NewNode(t testing.TB, opts lab.Options) *lab.Topology {
	t.Helper()
	Root(t)
	topo, err := lab.Node(opts)
	if err != nil {
		t.Fatal(err)
	}
	Close(t, topo.Close)
	return topo
}

// NewNS creates an anonymous namespace for a test and removes it afterwards.
func NewNS(t testing.TB) *lab.NS {
	t.Helper()
	Root(t)
	ns, err := lab.NewNS("")
	if err != nil {
		t.Fatal(err)
	}
	Close(t, ns.Close)
	return ns
}

// Capture starts a capture that ends with the test.
func Capture(t testing.TB, ns *lab.NS, dev string, opts lab.CaptureOptions) *lab.Capture {
	t.Helper()
	c, err := lab.StartCapture(ns, dev, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Stop)
	return c
}

// Close closes something at the end of the test, and fails it if that fails.
func Close(t testing.TB, close func() error) {
	t.Helper()
	t.Cleanup(func() {
		t.Helper()
		if err := close(); err != nil {
			t.Error(err)
		}
	})
}

// BPFFS returns a new directory with a BPF file system of its own.
func BPFFS(t testing.TB) string {
	t.Helper()
	Root(t)
	dir := t.TempDir()
	unmount, err := lab.MountBPFFS(dir)
	if err != nil {
		t.Fatal(err)
	}
	Close(t, unmount)
	return dir
}

// Patience stretches a time-out by the factor in PatienceEnv.
func Patience(d time.Duration) time.Duration {
	if factor, err := strconv.Atoi(os.Getenv(PatienceEnv)); err == nil && factor > 1 {
		d *= time.Duration(factor)
	}
	return d
}

// Eventually waits until cond returns nil, and fails the test with its last
// error after the timeout.
func Eventually(t testing.TB, timeout time.Duration, cond func() error) {
	t.Helper()
	timeout = Patience(timeout)
	deadline := time.After(timeout)
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for {
		err := cond()
		if err == nil {
			return
		}
		select {
		case <-poll.C:
		case <-deadline:
			t.Fatalf("not within %s: %v", timeout, err)
		}
	}
}

// Rand returns the source of randomness of a test. The seed is logged; SeedEnv
// sets it.
func Rand(t testing.TB) *rand.Rand {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv(SeedEnv); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("%s: %v", SeedEnv, err)
		}
	}
	t.Logf("replay with %s=%d", SeedEnv, seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// Thin returns the cases that this run is for: all of them, but for ThinEnv. What it
// leaves out is in the log of the test.
func Thin[T any](t testing.TB, what string, cases []T) []T {
	t.Helper()
	setting := os.Getenv(ThinEnv)
	if setting == "" {
		return cases
	}
	var stride, first int
	if n, err := fmt.Sscanf(setting, "%d:%d", &stride, &first); n != 2 || err != nil || first < 0 || first >= stride {
		t.Fatalf("%s: %q is not STRIDE:FIRST, as 4:1", ThinEnv, setting)
	}
	var some []T
	for i := first; i < len(cases); i += stride {
		some = append(some, cases[i])
	}
	if len(some) == 0 && len(cases) > 0 {
		some = cases[first%len(cases):][:1] // a test without a case would show nothing
	}
	t.Logf("thinned: %d of %d %s, every %dth from number %d", len(some), len(cases), what, stride, first)
	return some
}
