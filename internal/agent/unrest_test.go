package agent

import (
	"bytes"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// Another agent that changes the rules all the time does not fill the log, and shows in the
// status until it has stopped.
func TestUnrest(t *testing.T) {
	const warning = "rules are changed by others again and again: IPv4: table nat: a rule stands before ours in POSTROUTING"
	synctest.Test(t, func(t *testing.T) {
		b, r, n := newRuleBench(t)
		var log bytes.Buffer
		logger := slog.New(slog.NewTextHandler(&log, nil))
		b.loop.log, n.log, n.unrest.log = logger, logger, logger
		warned := func() bool { return slices.Contains(b.state(t).Warnings, warning) }
		harm := func(times int) {
			for range times {
				r.set(func() { r.changed = "IPv4: table nat: a rule stands before ours in POSTROUTING" })
				after(2500 * time.Millisecond)
			}
		}
		b.run(t, func() {
			after(2500 * time.Millisecond)
			log.Reset()
			harm(3)
			if lines := strings.Count(log.String(), "\n"); lines != 3 || warned() {
				t.Errorf("%d lines, want 3; warned %v:\n%s", lines, warned(), log.String())
			}
			harm(1)
			if !warned() {
				t.Errorf("no warning: %q", b.state(t).Warnings)
			}
			log.Reset()
			harm(10 * 24) // 10 minutes
			if lines := strings.Count(log.String(), "\n"); lines < 9 || lines > 10 {
				t.Errorf("%d lines in 10 minutes:\n%s", lines, log.String())
			}
			if !strings.Contains(log.String(), "times=24 what=\"IPv4: table nat: a rule stands before ours") || !warned() {
				t.Errorf("warned %v:\n%s", warned(), log.String())
			}
			after(2 * time.Minute)
			if warned() {
				t.Error("still warned of what is over")
			}
			log.Reset()
			harm(1)
			if lines := strings.Count(log.String(), "\n"); lines != 1 {
				t.Errorf("%d lines of a change after peace:\n%s", lines, log.String())
			}
		})
	})
}

// Changes of another kind each time are as many.
func TestUnrestOfManyKinds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		u := unrest{log: slog.New(slog.NewTextHandler(&log, nil))}
		for i := range 120 {
			u.note(strings.Repeat("x", i+1))
			time.Sleep(time.Second)
		}
		if lines := strings.Count(log.String(), "\n"); lines != unrestHeals+1 {
			t.Errorf("%d lines:\n%s", lines, log.String())
		}
		if w := u.warnings(); len(w) != 1 || !strings.HasSuffix(w[0], ": x; xx; xxx") {
			t.Errorf("%q", w)
		}
	})
}
