package lab

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"time"
)

// Content is n bytes that depend only on the seed.
func Content(seed uint64, n int64) io.Reader {
	var key [32]byte
	binary.LittleEndian.PutUint64(key[:], seed)
	return io.LimitReader(rand.NewChaCha8(key), n)
}

// ServeContent starts an HTTP server for GET /content?n=BYTES&seed=SEED. The
// header Seen-Source of the answer is the client's address as the server sees it.
func ServeContent(ns *NS, local netip.AddrPort) (*Server, error) {
	l, err := ListenTCP(ns, local)
	if err != nil {
		return nil, err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /content", func(w http.ResponseWriter, r *http.Request) {
		n, err1 := strconv.ParseInt(r.FormValue("n"), 10, 64)
		seed, err2 := strconv.ParseUint(r.FormValue("seed"), 10, 64)
		if err := errors.Join(err1, err2); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		w.Header().Set("Seen-Source", r.RemoteAddr)
		w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
		io.Copy(w, Content(seed, n)) // a client that went away notices itself
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: 30 * time.Second}
	s := &Server{Addr: l.Addr().(*net.TCPAddr).AddrPort(), stop: srv.Close}
	s.done.Go(func() { srv.Serve(l) })
	return s, nil
}

// Fetch gets content from a ServeContent server over a connection of its own,
// compares every byte, and returns the source address the server saw.
func Fetch(ctx context.Context, ns *NS, server netip.AddrPort, seed uint64, n int64) (netip.AddrPort, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives:  true,
		DisableCompression: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return DialTCP(ctx, ns, netip.AddrPort{}, server)
		},
	}}
	url := fmt.Sprintf("http://%s/content?n=%d&seed=%d", server, n, seed)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return netip.AddrPort{}, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return netip.AddrPort{}, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return netip.AddrPort{}, fmt.Errorf("fetch %s: %s", url, resp.Status)
	}
	if err := sameBytes(resp.Body, Content(seed, n), n); err != nil {
		return netip.AddrPort{}, fmt.Errorf("fetch %s: %w", url, err)
	}
	return netip.ParseAddrPort(resp.Header.Get("Seen-Source"))
}

// sameBytes reads n bytes of both and compares them.
func sameBytes(got, want io.Reader, n int64) error {
	g, w := bufio.NewReaderSize(got, 64<<10), bufio.NewReaderSize(want, 64<<10)
	for i := range n {
		b, err := g.ReadByte()
		if err != nil {
			return fmt.Errorf("after %d of %d bytes: %w", i, n, err)
		}
		if x, _ := w.ReadByte(); x != b {
			return fmt.Errorf("byte %d of %d: altered", i, n)
		}
	}
	return nil
}
