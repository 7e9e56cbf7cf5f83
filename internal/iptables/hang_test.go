package iptables

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab/labtest"
)

// A binary that hangs is an error after a time, and ends at once when the agent does.
func TestHungBinary(t *testing.T) {
	for name, patient := range map[string]bool{"in time": false, "when the agent ends": true} {
		t.Run(name, func(t *testing.T) {
			o := Options{Backend: NFT, LockTimeout: time.Second, dirs: []string{t.TempDir()}, runTime: time.Millisecond}
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if patient {
				o.runTime = time.Hour
				time.AfterFunc(100*time.Millisecond, cancel)
			}
			fake(t, o.dirs[0], "iptables-nft-save", "exec sleep 1000\n")
			_, err := o.run(ctx, o.find("iptables-nft-save"), "")
			if want := map[bool]error{false: errHangs, true: context.Canceled}[patient]; !errors.Is(err, want) {
				t.Errorf("%v, want %v", err, want)
			}
		})
	}
}

// Who looks at a node whose binaries hang waits once, not for each of them, and is not told
// that there is nothing of ours.
func TestReadersWithHungBinaries(t *testing.T) {
	o := Options{dirs: []string{t.TempDir()}, readTime: 100 * time.Millisecond, runTime: time.Hour}
	const hang = "exec sleep 1000\n"
	for _, b := range []Backend{NFT, Legacy} {
		for _, name := range append(family4(b), family6(b)...) {
			fake(t, o.dirs[0], name, hang)
		}
	}
	versionHangs := o
	versionHangs.dirs = append([]string{t.TempDir()}, o.dirs...)
	fake(t, versionHangs.dirs[0], "iptables", hang)
	i := &Inspector{backend: NFT, nat: map[Family]tableState{IPv4: {}, IPv6: {}}}
	for _, o := range []Options{o, versionHangs} {
		for name, read := range map[string]func(context.Context) error{
			"inspect": func(ctx context.Context) error { _, err := Inspect(ctx, o); return err },
			"drops":   func(ctx context.Context) error { _, err := i.Drops(ctx, o); return err },
			"foreign": func(ctx context.Context) error { _, err := Foreign(ctx, o, podSources); return err },
		} {
			ctx, cancel := context.WithTimeout(t.Context(), labtest.Patience(20*time.Second))
			err := read(ctx)
			if ctx.Err() != nil || !errors.Is(err, errHangs) || err.Error() != "iptables: no answer for 100ms" || !strings.Contains(hints(err), "hangs") {
				t.Errorf("%s: %v, hints %q", name, err, hints(err))
			}
			cancel()
		}
	}
}

// The caller may have less time, or lose interest.
func TestReaderEndedByCaller(t *testing.T) {
	o := Options{dirs: []string{t.TempDir()}}
	fake(t, o.dirs[0], "iptables", "exec sleep 1000\n")
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	fake(t, o.dirs[0], "iptables-nft-save", "")
	fake(t, o.dirs[0], "iptables-nft-restore", "")
	if _, err := Inspect(short, o); !errors.Is(err, errHangs) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("short of time: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Inspect(ended, o); !errors.Is(err, context.Canceled) || hints(err) != "" {
		t.Errorf("canceled: %v, hints %q", err, hints(err))
	}
}

// Nor does a cleanup say that there was nothing.
func TestRemoveWithHungBinary(t *testing.T) {
	o := Options{Backend: NFT, LockTimeout: time.Second, dirs: []string{t.TempDir()}, runTime: time.Millisecond}
	for _, name := range family4(NFT) {
		fake(t, o.dirs[0], name, "exec sleep 1000\n")
	}
	err := labtest.NewNS(t).Do(func() error {
		if _, err := Remove(context.Background(), o); !errors.Is(err, errHangs) {
			t.Errorf("%v", err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
