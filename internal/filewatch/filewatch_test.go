package filewatch

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
)

const patience = 10 * time.Second // a test that waits this long fails

// never is a poll interval that no test lives to see.
const never = time.Hour

// watch is a Run under test.
type watch struct {
	t       *testing.T
	paths   []string
	changed chan struct{}
	checked chan time.Time // when each reading began
}

// start runs a watch until the test ends and checks that it left no goroutine.
func start(t *testing.T, opt Options, change func(*run)) *watch {
	t.Helper()
	goroutines := runtime.NumGoroutine()
	w := &watch{t: t, paths: opt.Paths, changed: make(chan struct{}, 1000), checked: make(chan time.Time, 100000)}
	ready := make(chan struct{})
	opt.Ready = func() { close(ready) }
	r, err := newRun(opt, func() { w.changed <- struct{}{} })
	if err != nil {
		t.Fatal(err)
	}
	r.checked = func(began time.Time) { w.checked <- began }
	if change != nil {
		change(r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.loop(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("returned %v", err)
		}
		for deadline := time.Now().Add(patience); runtime.NumGoroutine() > goroutines; runtime.Gosched() {
			if time.Now().After(deadline) {
				t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), goroutines)
			}
		}
	})
	<-ready
	return w
}

// notices waits until changed has been called.
func (w *watch) notices(what string) {
	w.t.Helper()
	select {
	case <-w.changed:
	case <-time.After(patience):
		w.t.Fatalf("%s: not noticed", what)
	}
}

// settle waits for a reading that began after everything so far, and returns how
// often changed was called until then. Watched directories are touched, so that
// there is such a reading.
func (w *watch) settle(root string) int {
	w.t.Helper()
	now := time.Now()
	for dir := range wantedDirs(w.paths) {
		if strings.HasPrefix(dir, root) {
			must(w.t, os.Chmod(dir, 0o755)) // an event, but no change of content
		}
	}
	late := time.After(patience)
	for {
		select {
		case began := <-w.checked:
			if !began.After(now) {
				continue
			}
			n := len(w.changed)
			for range n {
				<-w.changed
			}
			return n
		case <-late:
			w.t.Fatal("no reading")
		}
	}
}

// tell goes through the steps of a story.
func (w *watch) tell(root string, steps []step) {
	w.t.Helper()
	for _, s := range steps {
		s.do(w.t, root)
		if s.says {
			w.notices(s.what)
		}
		if n := w.settle(root); n > 0 && !s.says {
			w.t.Fatalf("%s: taken for a change", s.what)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestStories(t *testing.T) {
	for _, story := range stories {
		t.Run(story.name, func(t *testing.T) {
			dir := t.TempDir()
			if story.setup != nil {
				story.setup(t, dir)
			}
			w := start(t, Options{Paths: []string{filepath.Join(dir, story.path)}, Debounce: 5 * time.Millisecond, Poll: never}, nil)
			w.tell(dir, story.steps)
		})
	}
}

// Polling alone tells the same stories.
func TestStoriesPolled(t *testing.T) {
	for _, story := range stories {
		t.Run(story.name, func(t *testing.T) {
			dir := t.TempDir()
			if story.setup != nil {
				story.setup(t, dir)
			}
			var log bytes.Buffer
			w := start(t, Options{
				Paths: []string{filepath.Join(dir, story.path)}, Debounce: time.Millisecond, Poll: 2 * time.Millisecond,
				Log: slog.New(slog.NewTextHandler(&log, nil)),
			}, func(r *run) { r.open = func() (*fsnotify.Watcher, error) { return nil, syscall.EMFILE } })
			w.tell(dir, story.steps)
		})
	}
}

func TestNoWatcherWarnsOnceAndRecovers(t *testing.T) {
	dir := t.TempDir()
	var log bytes.Buffer
	opened := make(chan struct{})
	tries := 0
	r, err := newRun(Options{
		Paths: []string{filepath.Join(dir, "f")}, Poll: time.Millisecond,
		Log: slog.New(slog.NewTextHandler(&log, nil)),
	}, func() {})
	must(t, err)
	r.open = func() (*fsnotify.Watcher, error) {
		if tries++; tries < 5 {
			return nil, syscall.EMFILE
		}
		defer close(opened)
		return fsnotify.NewWatcher()
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- r.loop(ctx) }()
	<-opened
	cancel()
	must(t, <-done)
	if n := strings.Count(log.String(), "level=WARN"); n != 1 {
		t.Errorf("%d warnings:\n%s", n, log.String())
	}
}

func TestTruncateThenWriteIsOneChange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	put(t, path, "old")
	w := start(t, Options{Paths: []string{path}, Debounce: maxDelay, Poll: never}, nil)
	must(t, os.Truncate(path, 0))
	put(t, path, "old")
	if n := w.settle(filepath.Dir(path)); n > 0 {
		t.Errorf("truncated and written the same: %d changes", n)
	}
}

// A writer that never rests must not keep changes from being seen.
func TestContinuousWrites(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	w := start(t, Options{Paths: []string{path}, Poll: never}, nil)
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		text := []byte{}
		for tick := time.NewTicker(time.Millisecond); ; {
			select {
			case <-stop:
				tick.Stop()
				return
			case <-tick.C:
				text = append(text, 'x')
				_ = os.WriteFile(path, text, 0o644)
			}
		}
	}()
	for range 3 {
		w.notices("continuous writes")
	}
	close(stop)
	<-stopped
}

func TestDebounce(t *testing.T) {
	d := debounce{quiet: 100 * time.Millisecond}
	t0 := time.Now()
	for _, c := range []struct{ at, want time.Duration }{{0, 100}, {50, 100}, {90, 100}, {120, 80}, {199, 1}, {300, 0}} {
		if got := d.next(t0.Add(c.at * time.Millisecond)); got != c.want*time.Millisecond {
			t.Errorf("after %d ms: wait %v, want %d ms", c.at, got, c.want)
		}
	}
	d.fired()
	if got := d.next(t0.Add(time.Second)); got != d.quiet {
		t.Errorf("after firing: wait %v", got)
	}
	r, err := newRun(Options{Paths: []string{"x"}, Debounce: time.Minute}, nil)
	if err != nil || r.delay.quiet > maxDelay {
		t.Errorf("debounce %v, %v", r.delay.quiet, err)
	}
}

// A pipe or an unreadable entry is a state like any other.
func TestPipeDoesNotBlock(t *testing.T) {
	dir := t.TempDir()
	w := start(t, Options{Paths: []string{filepath.Join(dir, "f")}, Debounce: time.Millisecond, Poll: never}, nil)
	must(t, syscall.Mkfifo(filepath.Join(dir, "f"), 0o644))
	w.notices("a pipe")
	must(t, os.Remove(filepath.Join(dir, "f")))
	w.notices("its removal")
}

func TestNoPaths(t *testing.T) {
	if err := Run(t.Context(), Options{}, nil); err == nil || errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}
