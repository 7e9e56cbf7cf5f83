package labtest

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"
)

// spy is a testing.TB that remembers how a test ended.
type spy struct {
	testing.TB
	log, skipped, failed string
}

func (s *spy) Helper()                   {}
func (s *spy) Logf(f string, a ...any)   { s.log = fmt.Sprintf(f, a...) }
func (s *spy) Skipf(f string, a ...any)  { s.skipped = fmt.Sprintf(f, a...); runtime.Goexit() }
func (s *spy) Fatalf(f string, a ...any) { s.failed = fmt.Sprintf(f, a...); runtime.Goexit() }

// watch runs a function as a test of its own.
func watch(t *testing.T, f func(testing.TB)) *spy {
	s, done := &spy{TB: t}, make(chan struct{})
	go func() {
		defer close(done)
		f(s)
	}()
	<-done
	return s
}

func TestEventually(t *testing.T) {
	tries := 0
	s := watch(t, func(t testing.TB) {
		Eventually(t, 10*time.Second, func() error {
			if tries++; tries < 3 {
				return errors.New("not yet")
			}
			return nil
		})
	})
	if s.failed != "" || tries != 3 {
		t.Errorf("%q after %d tries", s.failed, tries)
	}
	s = watch(t, func(t testing.TB) {
		Eventually(t, 30*time.Millisecond, func() error { return errors.New("the last error") })
	})
	if !strings.Contains(s.failed, "the last error") {
		t.Errorf("failed with %q", s.failed)
	}
}

func TestRandReplays(t *testing.T) {
	var first uint64
	s := watch(t, func(t testing.TB) { first = Rand(t).Uint64() })
	_, seed, _ := strings.Cut(s.log, "=")
	t.Setenv(SeedEnv, seed)
	var again uint64
	watch(t, func(t testing.TB) { again = Rand(t).Uint64() })
	if first != again {
		t.Errorf("log %q: %d, then %d", s.log, first, again)
	}
	t.Setenv(SeedEnv, "x")
	if s = watch(t, func(t testing.TB) { Rand(t) }); s.failed == "" {
		t.Error("a seed that is no number was accepted")
	}
}

func TestMissingSkipsOrFails(t *testing.T) {
	need := func(t testing.TB) { Tool(t, "no-such-program") }
	t.Setenv("CI", "")
	if s := watch(t, need); !strings.HasPrefix(s.skipped, string(NoTool)) {
		t.Errorf("without CI: skipped %q failed %q", s.skipped, s.failed)
	}
	t.Setenv("CI", "true")
	if s := watch(t, need); !strings.HasPrefix(s.failed, string(NoTool)) {
		t.Errorf("with CI: skipped %q failed %q", s.skipped, s.failed)
	}
	s := watch(t, func(t testing.TB) { Root(t) })
	if (s.failed == "") != (os.Geteuid() == 0) {
		t.Errorf("root: failed %q with uid %d", s.failed, os.Geteuid())
	}
	s = watch(t, func(t testing.TB) { Kernel(t, Feature{"time travel", 999, 0}) })
	if !strings.HasPrefix(s.skipped, string(OldKernel)) {
		t.Errorf("kernel: skipped %q failed %q", s.skipped, s.failed)
	}
	if s = watch(t, func(t testing.TB) { Kernel(t, Feature{"fork", 1, 0}) }); s.skipped != "" {
		t.Errorf("kernel: skipped %q", s.skipped)
	}
}

// Runs with each first number together have all cases, and each says what it left out.
func TestThin(t *testing.T) {
	cases := []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}
	t.Setenv(ThinEnv, "")
	if got := Thin(t, "numbers", cases); !slices.Equal(got, cases) {
		t.Errorf("without %s: %v", ThinEnv, got)
	}
	var all []int
	for _, setting := range []string{"4:0", "4:1", "4:2", "4:3"} {
		t.Setenv(ThinEnv, setting)
		var some []int
		s := watch(t, func(t testing.TB) { some = Thin(t, "numbers", cases) })
		if want := fmt.Sprintf("%d of 10 numbers", len(some)); len(some) > 3 || !strings.Contains(s.log, want) {
			t.Errorf("%s: %v, log %q", setting, some, s.log)
		}
		all = append(all, some...)
	}
	if slices.Sort(all); !slices.Equal(all, cases) {
		t.Errorf("together %v", all)
	}
	for _, wrong := range []string{"4", "4:4", "0:0", "4:-1", "x"} {
		t.Setenv(ThinEnv, wrong)
		if s := watch(t, func(t testing.TB) { Thin(t, "numbers", cases) }); s.failed == "" {
			t.Errorf("%q was taken", wrong)
		}
	}
}
