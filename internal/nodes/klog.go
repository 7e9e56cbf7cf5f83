package nodes

import (
	"context"
	"log/slog"
	"sync"

	"k8s.io/klog/v2"
)

// quieter hands on what the client library logs. It knows neither what we do about an error nor
// whether it was expected: that we log ourselves.
type quieter struct{ slog.Handler }

func (q quieter) level(l slog.Level) slog.Level {
	if l >= slog.LevelError {
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

func (q quieter) Enabled(ctx context.Context, l slog.Level) bool {
	// What it says besides, such as all requests with their bodies, is for its own authors.
	return l >= slog.LevelInfo && q.Handler.Enabled(ctx, q.level(l))
}

func (q quieter) Handle(ctx context.Context, r slog.Record) error {
	r.Level = q.level(r.Level)
	return q.Handler.Handle(ctx, r)
}

func (q quieter) WithAttrs(attrs []slog.Attr) slog.Handler {
	return quieter{q.Handler.WithAttrs(attrs)}
}
func (q quieter) WithGroup(name string) slog.Handler { return quieter{q.Handler.WithGroup(name)} }

// bridged: the library has one log for the whole process.
var bridged sync.Once

func bridge(log *slog.Logger) {
	bridged.Do(func() { klog.SetSlogLogger(slog.New(quieter{log.Handler()})) })
}
