package talk

import (
	"context"
	"net"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestAsk(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	web := httptest.NewServer(Handler("me"))
	defer web.Close()
	go ServeTCP(tcp, "me")
	go ServeUDP(udp, "me")
	var d net.Dialer
	for proto, server := range map[string]string{
		"tcp": tcp.Addr().String(), "udp": udp.LocalAddr().String(), "http": strings.TrimPrefix(web.URL, "http://"),
	} {
		a, err := Ask(t.Context(), d.DialContext, proto, server)
		if err != nil || a.Server != "me" || a.Source.Addr().String() != "127.0.0.1" {
			t.Errorf("%s: %+v, %v", proto, a, err)
		}
	}
	silent, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if a, err := Ask(ctx, d.DialContext, "udp", silent.LocalAddr().String()); err == nil {
		t.Errorf("an answer from a silent server: %+v", a)
	}
}

// A hold that says that nothing broke is worth nothing unless it notices when
// something does: a connection that ends, one that is mixed up, a server that is gone.
func TestHoldNoticesBreaks(t *testing.T) {
	for name, breakIt := range map[string]func(c net.Conn, l net.Listener){
		"ended":    func(c net.Conn, _ net.Listener) { c.Close() },
		"mixed up": func(c net.Conn, _ net.Listener) { c.Write([]byte("of another\n")) },
		"refused":  func(_ net.Conn, l net.Listener) { l.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			first := make(chan net.Conn, 1)
			go ServeTCP(remembering{l, first}, "me")
			var d net.Dialer
			h, err := Start(t.Context(), d.DialContext, l.Addr().String(), 3)
			if err != nil {
				t.Fatal(err)
			}
			defer h.Stop()
			await(t, h, func(r Report) bool { return r.Open == 3 && r.Beats > 3 && r.Fresh > 1 })
			if r := h.Report(); r.Failed != 0 || len(r.Sources) != 1 {
				t.Errorf("before anything broke: %+v", r)
			}
			breakIt(<-first, l)
			await(t, h, func(r Report) bool { return r.Failed > 0 && len(r.Broken) > 0 })
		})
	}
}

func await(t *testing.T, h *Hold, cond func(Report) bool) {
	t.Helper()
	for range 500 {
		if cond(h.Report()) {
			return
		}
		time.Sleep(10 * time.Millisecond) // a Hold says nothing by itself
	}
	t.Fatalf("not within 5 s: %+v", h.Report())
}

// remembering hands out the first connection that it accepts.
type remembering struct {
	net.Listener
	first chan<- net.Conn
}

func (r remembering) Accept() (net.Conn, error) {
	c, err := r.Listener.Accept()
	if err == nil {
		select {
		case r.first <- c:
		default:
		}
	}
	return c, err
}

func TestHoldNeedsEveryConnection(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := l.Addr().String()
	l.Close()
	var d net.Dialer
	if h, err := Start(t.Context(), d.DialContext, server, 2); err == nil {
		h.Stop()
		t.Error("connections to nowhere are held")
	}
}
