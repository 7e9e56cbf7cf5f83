package datapath

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"bauta.dev/bauta/internal/lab"
	"bauta.dev/bauta/internal/lab/labtest"
	"bauta.dev/bauta/internal/policy"
)

// floodFor is how long the table is kept full.
const floodFor = 10 * time.Second

// A pod opens new flows without end. The table is full for all that time, new
// flows are refused and counted, and a connection that was there before goes on;
// nothing leaves untranslated.
func TestTableFullUnderFlood(t *testing.T) {
	t.Parallel()
	topo := labtest.NewNode(t, lab.Options{Pods: 2})
	b := newBench(t, topo.Node, Options{DefaultFlows: 64})
	b.apply(nodePolicy(t, topo))
	leaks := labtest.Capture(t, topo.World, "eth0", lab.CaptureOptions{Incoming: true, MaxPackets: 1, SnapLen: 64}).
		Count(lab.SourceIn(lab.PodRange4, lab.PodRange6))
	server, err := lab.EchoTCP(topo.World, netip.AddrPortFrom(topo.WorldAddr.V4, 0))
	if err != nil {
		t.Fatal(err)
	}
	labtest.Close(t, server.Close)
	_, conn, err := lab.AskTCP(within(t, 10*time.Second), topo.Pods[0], netip.AddrPort{}, server.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	flooder, err := lab.ListenUDP(topo.Pods[1], netip.AddrPortFrom(topo.PodAddrs[1].V4, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer flooder.Close()
	pace, sweeps := time.NewTicker(5*time.Millisecond), time.NewTicker(time.Second)
	defer pace.Stop()
	defer sweeps.Stop()
	end, port, rounds := time.After(floodFor), uint16(1), 0
	stop, done := make(chan struct{}), make(chan error, 1)
	var full Swept // the last sweep but for those that made room themselves
	burst := func(n int) {
		for range n {
			// Refused packets are no error here: the node drops them.
			flooder.WriteToUDPAddrPort([]byte("flood"), netip.AddrPortFrom(topo.WorldAddr.V4, port))
			port++
		}
	}
	for flooding := true; flooding; {
		select {
		case <-end:
			flooding = false
		case <-sweeps.C:
			if s := b.sweep(); s.Expired == 0 {
				full = s
			}
		case <-pace.C:
			burst(20)
			if rounds++; rounds == 10 {
				go func() { done <- echoUntil(conn, stop) }()
			}
		}
	}
	close(stop)
	if err := errors.Join(<-done); err != nil {
		t.Errorf("the connection that was there before: %v", err)
	}
	burst(64) // the last sweep may have made room
	if _, err := lab.AskUDP(within(t, 100*time.Millisecond), topo.Pods[0], netip.AddrPort{}, netip.AddrPortFrom(topo.WorldAddr.V4, 9), nil); err == nil {
		t.Error("a new flow passed a full table")
	}
	if n := b.count(policy.DropTableFull); n < 100 {
		t.Errorf("%d packets refused", n)
	}
	if n := leaks.N(); n != 0 {
		t.Errorf("%d packets left untranslated", n)
	}
	if full.Usage[0].Flows < 60 {
		t.Errorf("the table was not full: %+v", full)
	}
}
