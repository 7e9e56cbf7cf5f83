package talk

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
)

const (
	// beat is how often a held connection is used.
	beat = 50 * time.Millisecond
	// silence is how long a connection may be without an answer: longer than a few
	// retransmissions, shorter than anybody's patience.
	silence = 15 * time.Second
	// remembered is how many failures are described: one cause has many.
	remembered = 5
)

// Hold is a load that lasts: connections that stay open and are used all the
// time, and beside them one new connection after the other.
type Hold struct {
	cancel context.CancelFunc
	done   sync.WaitGroup

	mu     sync.Mutex
	report Report
}

// Report is what became of the connections of a Hold.
type Report struct {
	Open    int      // long-lived connections that work
	Beats   int      // exchanges over them
	Fresh   int      // short connections that worked
	Failed  int      // connections that did not, long or short
	Broken  []string // what the first of them said
	Sources []netip.Addr
}

// Start opens n connections to a TCP server, and fails unless all of them work.
func Start(ctx context.Context, dial Dial, server string, n int) (*Hold, error) {
	life, cancel := context.WithCancel(context.Background())
	h := &Hold{cancel: cancel}
	ready := make(chan error, n)
	for i := range n {
		h.done.Go(func() { h.keep(life, dial, server, i, ready) })
	}
	for range n {
		select {
		case err := <-ready:
			if err == nil {
				continue
			}
			h.Stop()
			return nil, err
		case <-ctx.Done():
			h.Stop()
			return nil, fmt.Errorf("hold %d connections to %s: %w", n, server, ctx.Err())
		}
	}
	h.done.Go(func() { h.storm(life, dial, server) })
	return h, nil
}

// Report says how it goes.
func (h *Hold) Report() Report {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := h.report
	r.Broken = append([]string(nil), r.Broken...)
	r.Sources = append([]netip.Addr(nil), r.Sources...)
	return r
}

// Stop closes the connections and says how it went.
func (h *Hold) Stop() Report {
	r := h.Report()
	h.cancel()
	h.done.Wait()
	return r
}

func (h *Hold) update(f func(*Report)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(&h.report)
}

// broke remembers what went wrong, unless it was the end.
func (h *Hold) broke(life context.Context, err error) {
	if life.Err() == nil {
		h.update(func(r *Report) {
			if r.Failed++; len(r.Broken) < remembered {
				r.Broken = append(r.Broken, time.Now().Format("15:04:05.000 ")+err.Error())
			}
		})
	}
}

// keep opens one connection, tells ready how that went, and uses it.
func (h *Hold) keep(life context.Context, dial Dial, server string, i int, ready chan<- error) {
	start, cancel := context.WithTimeout(life, silence)
	defer cancel()
	c, err := dial(start, "tcp", server)
	if err != nil {
		ready <- err
		return
	}
	defer c.Close()
	defer context.AfterFunc(life, func() { c.SetDeadline(time.Unix(1, 0)) })()
	in := bufio.NewReader(c)
	c.SetDeadline(time.Now().Add(silence))
	line, err := in.ReadBytes('\n')
	var a Answer
	if err = errors.Join(err, json.Unmarshal(line, &a)); err != nil {
		ready <- err
		return
	}
	h.update(func(r *Report) { r.Open++; r.see(a.Source.Addr()) })
	ready <- nil

	every := time.NewTicker(beat)
	defer every.Stop()
	for n := 0; ; n++ {
		select {
		case <-life.Done():
			return
		case <-every.C:
		}
		c.SetDeadline(time.Now().Add(silence))
		said := fmt.Sprintf("connection %d beat %d\n", i, n)
		_, err := c.Write([]byte(said))
		if err == nil {
			var back string
			if back, err = in.ReadString('\n'); err == nil && back != said {
				err = fmt.Errorf("%q came back as %q", said, back)
			}
		}
		if err != nil {
			h.update(func(r *Report) { r.Open-- })
			h.broke(life, fmt.Errorf("connection %d after %d beats: %w", i, n, err))
			return
		}
		h.update(func(r *Report) { r.Beats++ })
	}
}

// storm opens short connections, one after the other.
func (h *Hold) storm(life context.Context, dial Dial, server string) {
	every := time.NewTicker(beat)
	defer every.Stop()
	for {
		ctx, cancel := context.WithTimeout(life, silence)
		a, err := Ask(ctx, dial, "tcp", server)
		cancel()
		if err != nil {
			h.broke(life, fmt.Errorf("new connection: %w", err))
		} else {
			h.update(func(r *Report) { r.Fresh++; r.see(a.Source.Addr()) })
		}
		select {
		case <-life.Done():
			return
		case <-every.C:
		}
	}
}

func (r *Report) see(source netip.Addr) {
	for _, s := range r.Sources {
		if s == source {
			return
		}
	}
	r.Sources = append(r.Sources, source)
}
