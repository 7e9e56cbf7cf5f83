package agent

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"bauta.dev/bauta/internal/lab/labtest"
)

// The rules of a network namespace have one owner, which leaves nothing behind.
func TestOneOwnerOfTheRules(t *testing.T) {
	// What anybody can make must not keep the owner out.
	squatter, err := net.ListenUnix("unix", &net.UnixAddr{Name: "@bauta/iptables", Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer squatter.Close()
	dir := filepath.Join(t.TempDir(), "run")
	first, err := claimRulesIn(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := claimRulesIn(dir); !errors.Is(err, ErrBusy) || len(err.(*Error).Hints) == 0 {
		t.Errorf("a second owner: %v", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Fatalf("%v, %v", files, err)
	}
	for path, want := range map[string]os.FileMode{dir: os.ModeDir | 0o700, filepath.Join(dir, files[0].Name()): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, want %v; %v", path, info.Mode(), want, err)
		}
	}
	for range 2 {
		if err := first.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the directory is left: %v", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	again, err := claimRulesIn(dir)
	if err != nil {
		t.Fatal(err)
	}
	again.Close()
	if files, err := os.ReadDir(dir); err != nil || len(files) != 0 {
		t.Errorf("left: %v, %v", files, err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := claimRulesIn(dir); err == nil {
		t.Error("a lock where everybody can make one")
	}
}

// Those of other namespaces have others.
func TestOwnersSideBySide(t *testing.T) {
	dir := t.TempDir()
	for range 2 {
		var lock io.Closer
		if err := labtest.NewNS(t).Do(func() (err error) { lock, err = claimRulesIn(dir); return err }); err != nil {
			t.Fatal(err)
		}
		defer lock.Close()
	}
}

// Whoever comes while the owner goes gets it, and never two.
func TestOwnersInARow(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run")
	var group sync.WaitGroup
	var owner sync.Mutex
	var owned int
	for range 8 {
		group.Go(func() {
			for range 200 {
				lock, err := claimRulesIn(dir)
				if errors.Is(err, ErrBusy) {
					continue
				} else if err != nil {
					t.Error(err)
					return
				}
				if !owner.TryLock() {
					t.Error("two owners")
					return
				}
				owned++
				owner.Unlock()
				lock.Close()
			}
		})
	}
	group.Wait()
	if owned == 0 {
		t.Error("nobody owned it")
	}
}
