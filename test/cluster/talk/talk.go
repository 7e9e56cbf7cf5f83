// Package talk is what the pods of the cluster test and the outside say to one
// another: each server tells its client which source it saw and who it is.
//
// Servers take sockets and clients take a dialer, so that the same code runs in a
// pod and, for the outside, in a network namespace of the harness.
package talk

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"
)

// Answer is what a server says to its client.
type Answer struct {
	Source netip.AddrPort // of the client, as the server sees it
	Server string
}

func answer(peer net.Addr, name string) ([]byte, error) {
	source, err := netip.ParseAddrPort(peer.String())
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(Answer{netip.AddrPortFrom(source.Addr().Unmap().WithZone(""), source.Port()), name})
	return append(b, '\n'), err
}

// ServeTCP answers each connection once, and then sends back all it receives. It
// returns when the listener is closed.
func ServeTCP(l net.Listener, name string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			if hello, err := answer(c.RemoteAddr(), name); err == nil {
				if _, err := c.Write(hello); err == nil {
					io.Copy(c, c)
				}
			}
		}()
	}
}

// ServeUDP answers each datagram. It returns when the socket is closed.
func ServeUDP(c net.PacketConn, name string) {
	buf := make([]byte, 1<<16)
	for {
		_, peer, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil {
			continue // an ICMP error about an earlier answer
		}
		if hello, err := answer(peer, name); err == nil {
			c.WriteTo(hello, peer) // one that can't be sent is a time-out of the client
		}
	}
}

// Handler answers any HTTP request.
func Handler(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		source, _ := netip.ParseAddrPort(r.RemoteAddr)
		json.NewEncoder(w).Encode(Answer{netip.AddrPortFrom(source.Addr().Unmap(), source.Port()), name})
	})
}

// Dial makes a connection, as net.Dialer.DialContext does.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// Ask asks a server over "tcp", "udp" or "http" once. A datagram is sent again
// each second, since nobody else does.
func Ask(ctx context.Context, dial Dial, proto, server string) (a Answer, err error) {
	switch proto {
	case "tcp":
		a, err = askTCP(ctx, dial, server)
	case "udp":
		a, err = askUDP(ctx, dial, server)
	case "http":
		a, err = askHTTP(ctx, dial, server)
	default:
		err = errors.New("unknown protocol")
	}
	if err != nil {
		return a, fmt.Errorf("ask %s over %s: %w", server, proto, err)
	}
	return a, nil
}

func askTCP(ctx context.Context, dial Dial, server string) (a Answer, err error) {
	c, err := dial(ctx, "tcp", server)
	if err != nil {
		return a, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	line, err := bufio.NewReader(c).ReadBytes('\n')
	if err != nil {
		return a, errors.Join(err, ctx.Err())
	}
	return a, json.Unmarshal(line, &a)
}

func askUDP(ctx context.Context, dial Dial, server string) (a Answer, err error) {
	c, err := dial(ctx, "udp", server)
	if err != nil {
		return a, err
	}
	defer c.Close()
	buf := make([]byte, 1<<10)
	for {
		if _, err := c.Write([]byte("who am I\n")); err != nil {
			return a, err
		}
		again := time.Now().Add(time.Second)
		if end, ok := ctx.Deadline(); ok && end.Before(again) {
			again = end
		}
		c.SetReadDeadline(again)
		n, err := c.Read(buf)
		if err == nil {
			return a, json.Unmarshal(buf[:n], &a)
		}
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() || ctx.Err() != nil {
			return a, errors.Join(err, ctx.Err())
		}
	}
}

func askHTTP(ctx context.Context, dial Dial, server string) (a Answer, err error) {
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+server+"/", nil)
	if err != nil {
		return a, err
	}
	resp, err := client.Do(r)
	if err != nil {
		return a, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return a, errors.New(resp.Status)
	}
	return a, json.NewDecoder(resp.Body).Decode(&a)
}
