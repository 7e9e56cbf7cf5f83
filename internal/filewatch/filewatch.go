// Package filewatch says that the content of files has changed, however it was
// changed: written in place, renamed over, or swapped by the kubelet's ..data link.
//
// Notifications are only hints. After each the files are read again, and only a
// different digest of them all counts. So a lost or a needless notification costs
// time, never correctness, and a slow poll makes up for what inotify does not see
// (overlay and network file systems, exhausted limits).
package filewatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	defaultDebounce = 100 * time.Millisecond
	defaultPoll     = 10 * time.Second

	// maxDelay is the longest time between a first notification and reading the
	// files, however many follow. The contract allows 250 ms; the rest is for the
	// scheduler and for reading.
	maxDelay = 200 * time.Millisecond
)

// Options says what to watch.
type Options struct {
	// Paths are files, or directories whose files count (not those in directories
	// below, and none that begin with . or end in ~). They need not exist.
	Paths []string

	Debounce time.Duration // how long notifications must rest; zero: 100 ms, at most 200 ms
	Poll     time.Duration // how often to read without any notification; zero: 10 s
	Log      *slog.Logger  // zero: no log

	// Ready is called once, when every change from then on will be seen: read the
	// files after it.
	Ready func()
}

// Run watches until ctx is done, then returns nil. It calls changed, in its own
// goroutine, after the content of the watched files has changed. Where inotify is
// not to be had it warns once and polls.
func Run(ctx context.Context, opt Options, changed func()) error {
	r, err := newRun(opt, changed)
	if err != nil {
		return err
	}
	return r.loop(ctx)
}

// run is the state of one Run.
type run struct {
	opt     Options
	changed func()

	watcher *fsnotify.Watcher // nil: polling only
	warned  bool              // the present trouble with inotify has been logged
	watched map[string]bool
	last    digest // that the caller knows of
	now     digest // of the last reading
	delay   debounce

	open    func() (*fsnotify.Watcher, error)
	checked func(began time.Time) // for tests: after each reading and what it led to
}

func newRun(opt Options, changed func()) (*run, error) {
	if len(opt.Paths) == 0 {
		return nil, errors.New("no paths to watch")
	}
	paths := make([]string, len(opt.Paths))
	for i, p := range opt.Paths {
		abs, err := filepath.Abs(p)
		if err != nil {
			return nil, fmt.Errorf("watch %s: %w", p, err)
		}
		paths[i] = abs
	}
	opt.Paths = paths
	if opt.Debounce <= 0 {
		opt.Debounce = defaultDebounce
	}
	if opt.Poll <= 0 {
		opt.Poll = defaultPoll
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	return &run{
		opt: opt, changed: changed, watched: make(map[string]bool),
		delay: debounce{quiet: min(opt.Debounce, maxDelay)},
		open:  fsnotify.NewWatcher, checked: func(time.Time) {},
	}, nil
}

func (r *run) loop(ctx context.Context) error {
	defer r.close()
	r.arm()
	r.last = digestOf(r.opt.Paths)
	if r.opt.Ready != nil {
		r.opt.Ready()
	}
	poll := time.NewTicker(r.opt.Poll)
	defer poll.Stop()
	fire := time.NewTimer(r.opt.Poll)
	fire.Stop()
	defer fire.Stop()
	for {
		var events chan fsnotify.Event // nil, so never ready, without a watcher
		var failures chan error
		if r.watcher != nil {
			events, failures = r.watcher.Events, r.watcher.Errors
		}
		select {
		case <-ctx.Done():
			return nil
		case <-events:
			fire.Reset(r.delay.next(time.Now()))
		case err := <-failures:
			// Most likely the queue has overflowed: something was missed.
			r.opt.Log.Debug("file notification lost", "error", err)
			fire.Reset(r.delay.next(time.Now()))
		case <-fire.C:
			began := time.Now()
			r.delay.fired()
			r.check(ctx)
			r.checked(began)
		case <-poll.C:
			// A difference is treated as a notification, so that a writer at work
			// can finish here too.
			began := time.Now()
			switch {
			case r.delay.pending():
			case r.differs():
				fire.Reset(r.delay.next(time.Now()))
			default:
				r.checked(began)
			}
		}
	}
}

// check reads the files and tells the caller if they differ.
func (r *run) check(ctx context.Context) {
	if r.differs() {
		r.last = r.now
		if ctx.Err() == nil {
			r.changed()
		}
	}
}

// differs reads the files. The watches are renewed first: what happens after that
// is notified, what happened before is read.
func (r *run) differs() bool {
	r.arm()
	r.now = digestOf(r.opt.Paths)
	return r.now != r.last
}

// debounce spaces readings: after the last notification by quiet, but never
// later than maxDelay after the first.
type debounce struct {
	quiet time.Duration
	first time.Time // of the notifications not acted on yet; zero: none
}

// next is how long to wait from now, when a notification arrived.
func (d *debounce) next(now time.Time) time.Duration {
	if d.first.IsZero() {
		d.first = now
	}
	return max(0, min(d.quiet, d.first.Add(maxDelay).Sub(now)))
}

func (d *debounce) pending() bool { return !d.first.IsZero() }
func (d *debounce) fired()        { d.first = time.Time{} }
