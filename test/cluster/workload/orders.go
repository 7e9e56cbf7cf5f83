package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"bauta.dev/bauta/test/cluster/talk"
)

// orders has the pod act as a client.
//
//	GET /ask?proto=tcp|udp|http&to=ADDRESS:PORT   one question; the Answer
//	GET /ping?to=ADDRESS                          one ICMP echo
//	PUT /hold/NAME?to=ADDRESS:PORT&n=COUNT        begins a talk.Hold
//	GET, DELETE /hold/NAME                        its Report; DELETE ends it
type orders struct {
	mu    sync.Mutex
	holds map[string]*talk.Hold
}

// patience is for one question. It is longer than the first two retransmissions.
const patience = 5 * time.Second

func newOrders() http.Handler {
	o := &orders{holds: map[string]*talk.Hold{}}
	mux := http.NewServeMux()
	handle := func(pattern string, f func(context.Context, *http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), patience)
			defer cancel()
			v, err := f(ctx, r)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadGateway)
				return
			}
			json.NewEncoder(w).Encode(v)
		})
	}
	handle("GET /ask", ask)
	handle("GET /ping", pingOrder)
	handle("PUT /hold/{name}", o.begin)
	handle("GET /hold/{name}", o.report)
	handle("DELETE /hold/{name}", o.end)
	return mux
}

func ask(ctx context.Context, r *http.Request) (any, error) {
	var d net.Dialer
	return talk.Ask(ctx, d.DialContext, r.FormValue("proto"), r.FormValue("to"))
}

func pingOrder(ctx context.Context, r *http.Request) (any, error) {
	to, err := netip.ParseAddr(r.FormValue("to"))
	if err != nil {
		return nil, err
	}
	return "answered", ping(ctx, to)
}

func (o *orders) begin(ctx context.Context, r *http.Request) (any, error) {
	n, err := strconv.Atoi(r.FormValue("n"))
	if err != nil {
		return nil, err
	}
	var d net.Dialer
	h, err := talk.Start(ctx, d.DialContext, r.FormValue("to"), n)
	if err != nil {
		return nil, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.holds[r.PathValue("name")] != nil {
		h.Stop()
		return nil, errors.New("there is one of this name")
	}
	o.holds[r.PathValue("name")] = h
	return h.Report(), nil
}

func (o *orders) report(_ context.Context, r *http.Request) (any, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	h := o.holds[r.PathValue("name")]
	if h == nil {
		return nil, fmt.Errorf("hold %s: none", r.PathValue("name"))
	}
	return h.Report(), nil
}

func (o *orders) end(_ context.Context, r *http.Request) (any, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	h := o.holds[r.PathValue("name")]
	if h == nil {
		return nil, fmt.Errorf("hold %s: none", r.PathValue("name"))
	}
	delete(o.holds, r.PathValue("name"))
	return h.Stop(), nil
}
