package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"bauta.dev/bauta/internal/advice"
	"bauta.dev/bauta/internal/metrics"
)

// Bounds of prometheus-serve-addr. Anybody who reaches the address may ask.
const (
	httpConns   = 64 // the oldest one goes for the next
	httpHeaders = 8 << 10
	httpRead    = 5 * time.Second
	httpWrite   = 30 * time.Second // an answer is in memory before its first byte goes out
	httpIdle    = 2 * time.Minute  // scrapers keep their connection for the next time
	scrapes     = 2                // at a time
	scrapeWait  = 10 * time.Second
)

// httpServer answers on prometheus-serve-addr: metrics, liveness and readiness. It reads what
// the loop has published and never asks the loop for anything.
//
// An address that can't be had is no reason not to masquerade: it is tried again, and until then
// the log and the status say so.
type httpServer struct {
	addr    string
	stall   time.Duration        // liveness ends when the loop has been silent for so long
	silent  func() time.Duration // the loop
	unready func() []string      // a reason each
	metrics func(http.Header) (body []byte, contentType string, err error)
	retry   time.Duration // first pause after an error; doubles
	log     *slog.Logger

	failure atomic.Pointer[string] // why it does not answer now; nil: it does, or has not tried yet
	bound   atomic.Pointer[netip.AddrPort]
	busy    chan struct{}
}

const (
	stallAfter   = time.Minute
	httpRetry    = time.Second
	httpMaxRetry = 30 * time.Second
)

// newHTTP is the server of a loop; nil if the options want none.
func (l *loop) newHTTP() (*httpServer, error) {
	if l.cfg.MetricsAddr == "" {
		return nil, nil
	}
	exposition, err := metrics.NewExposition(metrics.New(l.reading))
	if err != nil {
		return nil, err
	}
	return &httpServer{
		addr: l.cfg.MetricsAddr, stall: stallAfter, silent: l.turned.silent, retry: httpRetry,
		unready: func() []string { return l.published.Load().health(time.Now()).Unready() },
		metrics: exposition.Render, log: l.log, busy: make(chan struct{}, scrapes),
	}, nil
}

// problem is for the status; empty: none.
func (s *httpServer) problem() string {
	if s == nil {
		return ""
	}
	if text := s.failure.Load(); text != nil {
		return *text
	}
	return ""
}

// run answers until ctx is done. It returns no errors: see httpServer.
func (s *httpServer) run(ctx context.Context) {
	for pause := s.retry; ; pause = min(2*pause, httpMaxRetry) {
		began := time.Now()
		err := s.serve(ctx)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > httpMaxRetry {
			pause = s.retry // it did answer
		}
		text := err.Error()
		if before := s.failure.Swap(&text); before == nil || *before != text {
			s.log.Error("no metrics and no health checks, retrying", "error", err, "hint", strings.Join(advice.Of(err), "; "), "after", pause)
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
	}
}

// serve answers until ctx is done or nothing can be accepted any more.
func (s *httpServer) serve(ctx context.Context) error {
	listener, err := listenTCP(ctx, s.addr)
	if err != nil {
		return err
	}
	bound, err := netip.ParseAddrPort(listener.Addr().String())
	if err == nil {
		s.bound.Store(&bound)
	}
	if s.failure.Swap(nil) != nil {
		s.log.Info("metrics and health checks answer again", "address", listener.Addr().String())
	}
	server := &http.Server{
		Handler:           s.handler(),
		ReadHeaderTimeout: httpRead,
		ReadTimeout:       httpRead,
		WriteTimeout:      httpWrite,
		IdleTimeout:       httpIdle,
		MaxHeaderBytes:    httpHeaders,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	defer server.Close()
	return fmt.Errorf("prometheus-serve-addr %s: %w", s.addr, server.Serve(newCrowd(listener, httpConns)))
}

// listenTCP listens on an address as the option has it. An IPv4 address means IPv4 only; [::] and
// no address at all mean both families.
func listenTCP(ctx context.Context, addr string) (net.Listener, error) {
	network := "tcp"
	if host, _, err := net.SplitHostPort(addr); err == nil {
		if ip, err := netip.ParseAddr(host); err == nil && ip.Is4() {
			network = "tcp4"
		}
	}
	l, err := new(net.ListenConfig).Listen(ctx, network, addr)
	if err == nil {
		return l, nil
	}
	if e, ok := errors.AsType[*net.OpError](err); ok {
		err = e.Err // without the address, which the option has
	}
	err = fmt.Errorf("prometheus-serve-addr %s: %w", addr, err)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, advice.New(err, "another program listens there: give another port, or `off`")
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, advice.New(err, "give an address of this node, or `:PORT` for all of them")
	case errors.Is(err, syscall.EACCES):
		return nil, advice.New(err, "ports below 1024 need CAP_NET_BIND_SERVICE: give a higher one")
	}
	return nil, err
}

func (s *httpServer) handler() http.Handler {
	mux := http.NewServeMux() // GET is HEAD too; other methods are refused
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if silent := s.silent(); silent > s.stall {
			sayHealth(w, []string{fmt.Sprintf("the agent's loop has not turned for %d s", int(silent.Seconds()))})
			return
		}
		sayHealth(w, nil)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) { sayHealth(w, s.unready()) })
	mux.HandleFunc("GET /metrics", s.scrape)
	return mux
}

// sayHealth answers a probe: the reasons against it, a line each, or ok.
func sayHealth(w http.ResponseWriter, reasons []string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	if len(reasons) == 0 {
		fmt.Fprintln(w, "ok")
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
	for _, r := range reasons {
		fmt.Fprintln(w, strings.ReplaceAll(r, "\n", " "))
	}
}

// scrape reads for a few scrapers at a time. One that is slow to take its answer keeps nobody
// waiting.
func (s *httpServer) scrape(w http.ResponseWriter, r *http.Request) {
	wait := time.NewTimer(scrapeWait)
	defer wait.Stop()
	select {
	case s.busy <- struct{}{}:
	case <-r.Context().Done():
		return
	case <-wait.C:
		http.Error(w, "too many scrapes at a time", http.StatusServiceUnavailable)
		return
	}
	body, contentType, err := s.metrics(r.Header)
	<-s.busy
	if err != nil {
		s.log.Warn("scrape not answered", "error", err)
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", fmt.Sprint(len(body)))
	w.Write(body) // a client that went away misses nothing
}
