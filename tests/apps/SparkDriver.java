import org.apache.spark.SparkConf;
import org.apache.spark.SparkContext;

/**
 * A driver that is a Spark application, as YARN asks of one, and asks for no executor.
 *
 * Compiled and run by Janino, as Driver.java is. Arguments: seconds to sleep, or the path of a file to wait for; exit
 * code, of which another one than 0 is an exception.
 */
public class SparkDriver {
    public static void main(String[] arguments) throws Exception {
        SparkContext context = new SparkContext(new SparkConf());
        if (arguments[0].startsWith("/")) {
            while (!new java.io.File(arguments[0]).exists()) {
                Thread.sleep(200);
            }
        } else {
            System.out.println("sleeping " + arguments[0] + " s");
            Thread.sleep((long) (1000 * Double.parseDouble(arguments[0])));
        }
        context.stop();
        System.err.println("exiting with " + arguments[1]);
        if (!arguments[1].equals("0")) {
            throw new RuntimeException("exiting with " + arguments[1]);
        }
    }
}
