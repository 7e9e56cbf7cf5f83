package labtest

import (
	"errors"
	"fmt"
	"os"
	"runtime"
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
