package agent

import (
	"context"
	"slices"
	"time"

	"bauta.dev/bauta/internal/datapath"
	"bauta.dev/bauta/internal/metrics"
)

// walked is the result of a walk through the flow tables.
type walked struct {
	swept datapath.Swept
	err   error
}

// sweep starts a walk through the flows, beside the loop: with a million
// flows it takes longer than a policy may wait. One walk runs at a time.
func (l *loop) sweep(ctx context.Context) {
	if l.walking {
		l.walkAgain = true
		return
	}
	l.walking = true
	go func() {
		swept, err := l.kernel.Walk(ctx)
		l.walked <- walked{swept, err}
	}()
}

// swept takes the result of a walk.
func (l *loop) swept(ctx context.Context, w walked) {
	l.walking = false
	l.nextWalk = time.Now().Add(rest(w.swept.Took))
	if ctx.Err() != nil {
		return
	}
	err := w.err
	if err == nil && l.cfg.BPF && l.inForce != nil { // netfilter walks through its table by itself
		l.walks.Store(new(l.sumOfWalks().After(w.swept, time.Now())))
	}
	if err == nil && l.flows != nil {
		before := l.changeover.draining()
		err = l.flows.Drain(w.swept)
		if !before.same(l.changeover.draining()) {
			l.publish()
		}
	}
	if err != nil && (l.sweepErr == nil || l.sweepErr.Error() != err.Error()) {
		l.log.Warn("sweep of the flows incomplete, retrying", "error", err, "after", l.timing.sweep)
	}
	l.sweepErr = err
	if w.swept.Vanished > 0 {
		l.log.Info("mappings ended, their address has left the node", "mappings", w.swept.Vanished)
	}
	l.log.Debug("swept", "expired", w.swept.Expired, "orphans", w.swept.Orphans, "took", w.swept.Took)
	if l.walkAgain {
		l.walkAgain = false
		l.sweep(ctx)
	}
}

// sumOfWalks is that of all walks that have ended.
func (l *loop) sumOfWalks() metrics.Walks {
	if before := l.walks.Load(); before != nil {
		return *before
	}
	return metrics.Walks{}
}

func (d *DrainingStatus) same(e *DrainingStatus) bool {
	return d == e || d != nil && e != nil && d.Mode == e.Mode && d.Connections == e.Connections && d.Since.Equal(e.Since) && slices.Equal(d.Addresses, e.Addresses)
}

// rest is the pause after a walk that took so long. A million flows take more than a
// second: a walk is at work for a twentieth of the time, but the pause has a limit, well
// below the time after which the kernel takes the agent for dead.
func rest(took time.Duration) time.Duration {
	const share, longest = 20, 30 * time.Second
	return min(took*(share-1), longest)
}

// awaitWalk returns when no walk is under way: the data plane is going to be closed.
func (l *loop) awaitWalk() {
	if l.walking {
		<-l.walked
	}
}
