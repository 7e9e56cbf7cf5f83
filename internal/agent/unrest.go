package agent

import (
	"log/slog"
	"slices"
	"strings"
	"time"
)

const (
	// unrestSpan is how long rules have to stay as they are for peace.
	unrestSpan = time.Minute
	// unrestHeals are so many that they are told one by one.
	unrestHeals = 3
	// unrestReasons are as many as one line can name.
	unrestReasons = 3
)

// unrest is how often others change what is ours. Another agent that also wants to be first
// does it for ever: then a line a minute has to do.
type unrest struct {
	log    *slog.Logger
	heals  []time.Time // of the last unrestSpan
	what   []string    // has changed since peace, each once
	going  bool        // more heals than are told one by one
	told   time.Time
	untold int // heals since then
}

// note takes note of a change, and logs it or what there is of them.
func (u *unrest) note(what string) {
	now := time.Now()
	u.settle(now)
	u.heals = append(u.heals, now)
	if !slices.Contains(u.what, what) && len(u.what) < unrestReasons {
		u.what = append(u.what, what)
	}
	switch {
	case !u.going && len(u.heals) <= unrestHeals:
		u.log.Warn("rules were changed by others, applying them again", "what", what)
	case !u.going: // the warning of the status is logged
		u.going, u.told = true, now
	default:
		u.untold++
		if now.Sub(u.told) >= unrestSpan {
			u.log.Warn("rules are still being changed by others, and applied again", "times", u.untold, "what", strings.Join(u.what, "; "))
			u.told, u.untold = now, 0
		}
	}
}

// settle forgets what is long ago.
func (u *unrest) settle(now time.Time) {
	u.heals = slices.DeleteFunc(u.heals, func(t time.Time) bool { return now.Sub(t) >= unrestSpan })
	if len(u.heals) == 0 {
		u.what, u.going, u.untold = nil, false, 0
	}
}

// warnings are those of the status.
func (u *unrest) warnings() []string {
	if u.settle(time.Now()); !u.going {
		return nil
	}
	return []string{"rules are changed by others again and again: " + strings.Join(u.what, "; ")}
}
