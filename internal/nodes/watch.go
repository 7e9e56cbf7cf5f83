package nodes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"strconv"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// timing of what goes on with the API server; tests shorten it.
type timing struct {
	answer   time.Duration // a request or a list that gives nothing for so long has stalled
	initial  time.Duration // a watch that is to begin with what there is and gives nothing for so long does not know how
	quiet    time.Duration // so has a watch: a server sends a bookmark each minute
	settle   time.Duration // a watch that is open for so long works
	spread   time.Duration // within which the watches of all nodes begin again that ended together
	watch    time.Duration // how long a watch is asked for: once to twice this
	retry    time.Duration // first pause after an error; doubles
	maxRetry time.Duration
}

var defaultTiming = timing{
	answer:   30 * time.Second,
	initial:  5 * time.Second,
	quiet:    4 * time.Minute,
	settle:   2 * time.Second,
	spread:   time.Second,
	watch:    5 * time.Minute,
	retry:    500 * time.Millisecond,
	maxRetry: 30 * time.Second,
}

var (
	errStalled = errors.New("the API server says nothing")
	errEmpty   = errors.New("the API server lists no node at all, not even this one: not believed")
	// errNoStream says that a server does not send what there is as the beginning of a watch
	// (before Kubernetes 1.32, or switched off).
	errNoStream = errors.New("no initial events")
)

// maxShort is after how many watches that ended at once there is a list again: of a server that has
// none, that is how changes are seen.
const maxShort = 4

// follower is where we are in the history of the Node objects.
type follower struct {
	*Client
	version string // known up to here; empty: nothing
	listed  bool   // what is known is complete: a watch from version goes on with it
	list    bool   // the server has no initial events
	settled bool   // the last session worked
	early   bool   // and ended before its time
	short   int    // so many in a row ended at once
	once    bool   // something was listed once
}

// follow keeps the state like the cluster until ctx is done.
func (c *Client) follow(ctx context.Context) {
	f := &follower{Client: c}
	pause := time.Duration(0)
	for ctx.Err() == nil {
		f.settled = false
		err := f.session(ctx)
		if ctx.Err() != nil {
			return
		}
		if f.settled {
			pause, f.short = 0, 0
		}
		if err == nil && f.settled {
			// A server ends each watch after some time. If it ends all of them, it is going away,
			// and all nodes come at once.
			if f.early {
				sleep(ctx, time.Duration(rand.Float64()*float64(c.timing.spread)))
			}
			continue
		}
		if err == nil {
			err = errors.New("the watch ended at once")
			if f.short++; f.short >= maxShort {
				f.short, f.listed, f.list = 0, false, true
			}
		}
		if errors.Is(err, errNoStream) && !f.list {
			f.list = true
			c.log.Debug("the API server has no initial events, listing instead", "error", err)
			continue
		}
		f.forget(err)
		pause = min(max(2*pause, c.timing.retry), c.timing.maxRetry)
		wait := time.Duration(float64(pause) * (0.5 + rand.Float64())) // not all nodes at once
		if seconds, ok := apierrors.SuggestsClientDelay(err); ok {
			wait = max(wait, min(time.Duration(seconds)*time.Second, c.timing.maxRetry))
		}
		c.log.Debug("nodes not watched, retrying", "error", err, "after", wait)
		c.state.fail(brief(err))
		sleep(ctx, wait)
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// forget drops the version if the server can't go on from there. What is known stays.
func (f *follower) forget(err error) {
	switch {
	case apierrors.IsResourceExpired(err), apierrors.IsGone(err):
		if !f.listed { // not even a list that is newer is to be had
			f.version = ""
		}
		f.listed = false
	case apierrors.HasStatusCause(err, metav1.CauseTypeResourceVersionTooLarge), apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		f.listed, f.version = false, "" // a server with another history
	}
}

// session lists what has to be listed, and watches until something ends that. A watch may
// begin with what there is.
func (f *follower) session(ctx context.Context) error {
	if !f.listed && f.list {
		if err := f.listAll(ctx); err != nil {
			return err
		}
	}
	return f.watch(ctx)
}

// brief is an error without what differs from time to time, such as the port of this side, and
// without the address that was asked for, which is in the configuration.
func brief(err error) string {
	text := err.Error()
	if e, ok := errors.AsType[runtime.NegotiateError](err); ok {
		text = strings.Replace(text, e.Error(), fmt.Sprintf("the answer is %s, not that of an API server", e.ContentType), 1)
	}
	if e, ok := errors.AsType[*url.Error](err); ok {
		text = strings.Replace(text, e.Error(), e.Err.Error(), 1)
	}
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Source != nil {
		plain := *e
		plain.Source = nil
		text = strings.Replace(text, e.Error(), plain.Error(), 1)
	}
	return text
}

// deadline cancels a context when it was not put off in time.
type deadline struct {
	timer  *time.Timer
	cancel context.CancelCauseFunc
}

func newDeadline(ctx context.Context, after time.Duration) (context.Context, *deadline) {
	ctx, cancel := context.WithCancelCause(ctx)
	d := &deadline{cancel: cancel}
	d.timer = time.AfterFunc(after, func() { cancel(fmt.Errorf("%w for %s", errStalled, after)) })
	return ctx, d
}

func (d *deadline) put(after time.Duration) { d.timer.Reset(after) }

func (d *deadline) close() {
	d.timer.Stop()
	d.cancel(nil)
}

// cause is why a request under a deadline ended.
func cause(ctx context.Context, err error) error {
	if c := context.Cause(ctx); errors.Is(c, errStalled) {
		return c
	}
	return err
}

// request begins a request for Nodes. Retries are ours: those of the library would hide why.
func (f *follower) request() *rest.Request {
	return f.rest.Get().Resource("nodes").MaxRetries(0)
}

// listAll reads a complete list, from the server's cache where it has one.
func (f *follower) listAll(ctx context.Context) error {
	ctx, quiet := newDeadline(ctx, f.timing.answer)
	defer quiet.close()
	req := f.request()
	switch {
	case f.version != "":
		req.Param("resourceVersion", f.version) // or newer
	case !f.once:
		req.Param("resourceVersion", "0")
	}
	body, err := req.Stream(ctx)
	if err != nil {
		return fmt.Errorf("list nodes: %w", cause(ctx, err))
	}
	defer body.Close()
	list := make(map[string]*node)
	version, err := readList(putOff{body, quiet, f.timing.answer}, func(n *node) { list[n.name] = n })
	if err != nil {
		return fmt.Errorf("list nodes: %w", cause(ctx, err))
	}
	return f.take(list, version)
}

// putOff puts a deadline off with each read.
type putOff struct {
	io.Reader
	quiet *deadline
	after time.Duration
}

func (p putOff) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	if n > 0 {
		p.quiet.put(p.after)
	}
	return n, err
}

// take puts a complete list in force.
func (f *follower) take(list map[string]*node, version string) error {
	if len(list) == 0 {
		return errEmpty
	}
	f.state.replace(list)
	f.version, f.listed, f.once = version, true, true
	f.log.Debug("nodes listed", "nodes", len(list))
	return nil
}

// watch follows events from the version on, or begins with what there is.
func (f *follower) watch(ctx context.Context) error {
	initial := !f.listed
	ctx, quiet := newDeadline(ctx, f.timing.answer)
	defer quiet.close()
	seconds := max(1, int(f.timing.watch.Seconds()*(1+rand.Float64())))
	start := time.Now()
	defer func() { f.early = time.Since(start) < time.Duration(seconds-1)*time.Second }()
	req := f.request().Param("watch", "true").Param("allowWatchBookmarks", "true").
		Param("timeoutSeconds", strconv.Itoa(seconds))
	if initial {
		req.Param("sendInitialEvents", "true").Param("resourceVersionMatch", "NotOlderThan")
	}
	if f.version != "" {
		req.Param("resourceVersion", f.version)
	}
	w, err := req.Watch(ctx)
	if err != nil {
		err = fmt.Errorf("watch nodes: %w", cause(ctx, err))
		if initial && (apierrors.IsInvalid(err) || apierrors.IsBadRequest(err)) {
			err = fmt.Errorf("%w: %w", errNoStream, err)
		}
		return err
	}
	defer w.Stop()
	if initial {
		if err := f.begin(ctx, w, quiet); err != nil {
			return err
		}
	}
	return f.goOn(ctx, w, quiet, initial)
}

// begin collects what there is until the server says that this was all.
func (f *follower) begin(ctx context.Context, w watch.Interface, quiet *deadline) error {
	list := make(map[string]*node)
	for {
		quiet.put(f.timing.initial)
		e, ok := <-w.ResultChan()
		n, err := f.object(e)
		if !ok {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			err = fmt.Errorf("list nodes: %w", cause(ctx, err))
			if errors.Is(err, errStalled) || // that was all, but nobody says so
				!ok && len(list) == 0 ||
				e.Type == watch.Error && apierrors.IsInternalError(err) { // of an etcd that can't tell how far it is
				err = fmt.Errorf("%w: %w", errNoStream, err)
			}
			return err
		}
		switch e.Type {
		case watch.Added, watch.Modified:
			list[n.name] = n
		case watch.Deleted:
			delete(list, n.name)
		case watch.Bookmark:
			if !n.initialEnd {
				return errNoStream // an old one, that did not see what we asked for
			}
			return f.take(list, n.version)
		}
	}
}

// goOn follows events until the watch ends. One without a word may be of a cluster in which
// nothing happens, or dead, or of a server with another history, which has not come to our version yet.
// If it was not begun with a list, the next one is.
func (f *follower) goOn(ctx context.Context, w watch.Interface, quiet *deadline, heard bool) error {
	settled := time.NewTimer(f.timing.settle)
	defer settled.Stop()
	quiet.put(f.timing.quiet)
	for {
		select {
		case <-settled.C:
			f.settled = true
			f.state.heard()
		case e, ok := <-w.ResultChan():
			if errors.Is(context.Cause(ctx), errStalled) {
				f.listed = heard
				return nil
			}
			if !ok {
				return nil
			}
			n, err := f.object(e)
			if err != nil {
				return fmt.Errorf("watch nodes: %w", err)
			}
			quiet.put(f.timing.quiet)
			f.settled, heard = true, true
			f.apply(e.Type, n)
		}
	}
}

// apply takes an event.
func (f *follower) apply(typ watch.EventType, n *node) {
	if n.version != "" {
		f.version = n.version
	}
	switch typ {
	case watch.Added, watch.Modified:
		f.state.put(n)
	case watch.Deleted:
		f.state.remove(n.name)
	case watch.Bookmark:
		f.state.heard()
	}
}

// object is the Node of an event.
func (f *follower) object(e watch.Event) (*node, error) {
	if e.Type == watch.Error {
		return nil, apierrors.FromObject(e.Object)
	}
	n, ok := e.Object.(*node)
	switch {
	case !ok:
		return nil, fmt.Errorf("event %s with an object of type %T", e.Type, e.Object)
	case n.name == "" && e.Type != watch.Bookmark:
		return nil, fmt.Errorf("event %s with a Node without a name", e.Type)
	}
	return n, nil
}
